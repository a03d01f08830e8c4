# make demo | serve | check | test | clean. Needs make and Python 3.11 or newer; everything else is installed into .venv.
PYTHON ?= python3
# Each worker imports torch (a few seconds, 300 MB) and runs it on one thread.
TEST_WORKERS ?= 2
PYTEST_ARGS ?=

BIN := .venv/bin
STAMP := .venv/.installed
EXTRAS := service,otel,offline,demo,dev

.DEFAULT_GOAL := help
.PHONY: help setup demo serve check test constraints clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP) ## Install hardlook and all it needs into .venv
	@echo "setup: .venv is up to date with pyproject.toml and constraints.txt"

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "setup: Python 3.11 or newer is needed, '$(PYTHON)' is not that; name another: make setup PYTHON=python3.11" >&2; \
		exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "setup: installing into .venv; the first time this fetches torch and its libraries, several GB"
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable ".[$(EXTRAS)]"
	@touch $@

demo: setup ## Build pools from public photographs, serve them, ask the service, correct it
	$(BIN)/hardlook-demo
	@echo "demo: finished"

serve: setup ## Run the service in the foreground: bundled encoder and demo pools, or what HARDLOOK_* say
	@test -n "$(HARDLOOK_POOLS)" || $(BIN)/hardlook-demo --prepare .demo/pools
	@echo "serve: encoder $${HARDLOOK_ENCODER:-bundled/fare4}, pools $${HARDLOOK_POOLS:-.demo/pools}"
	@echo "serve: the console is at http://$${HARDLOOK_HOST:-127.0.0.1}:$${HARDLOOK_PORT:-8000}/console"
	HARDLOOK_ENCODER=$${HARDLOOK_ENCODER:-bundled/fare4} HARDLOOK_POOLS=$${HARDLOOK_POOLS:-.demo/pools} $(BIN)/hardlook-serve
	@echo "serve: the service has stopped"

check: setup ## Format, lint, types, import directions, container files
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -q tests/docker
	@echo "check: format, lint, types, import directions and container files are in order"

test: setup ## Run the test suite (all but gpu, load, network; what drives a browser, where there is Chromium)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(TEST_WORKERS) --dist loadfile $(PYTEST_ARGS)
	@echo "test: all tests passed"

constraints: ## Install the newest versions that pyproject.toml allows and write constraints.txt anew
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable ".[$(EXTRAS),pretrain]"
	{ sed -n '/^#/p' constraints.txt; \
	  $(BIN)/python -m pip list --format=freeze --exclude-editable --exclude pip --exclude setuptools; \
	} > constraints.txt.partial
	mv constraints.txt.partial constraints.txt
	@echo "constraints: constraints.txt is renewed; run 'make check test' before committing it"

clean: ## Remove .venv, caches and build output; pools and runs stay
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	@echo "clean: removed .venv, caches and build output"
