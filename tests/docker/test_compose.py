"""The container files agree with the package they run: read as text, since no container engine runs here."""

import importlib
import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from service.settings import Settings

ROOT = Path(__file__).parents[2]
COMPOSE_FILES = ("docker-compose.yml", "docker/compose.gpu.yml")
PREFIX = "HARDLOOK_"


def compose(name: str = "docker-compose.yml") -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / name).read_text("utf8"))
    return loaded


def service() -> dict[str, Any]:
    found: dict[str, Any] = compose()["services"]["hardlook"]
    return found


def instructions() -> list[tuple[str, str]]:
    """`(INSTRUCTION, arguments)` of the Dockerfile in order; comments dropped, continued lines joined."""
    text = (ROOT / "docker" / "Dockerfile").read_text("utf8")
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", lines)
    return [(line.split(maxsplit=1)[0].upper(), line.split(maxsplit=1)[1]) for line in joined.splitlines() if line]


def final_stage() -> list[tuple[str, str]]:
    all_of_it = instructions()
    start = max(i for i, (instruction, _) in enumerate(all_of_it) if instruction == "FROM")
    return all_of_it[start:]


def arguments(instruction: str) -> str:
    """Of the last such instruction in the final stage, the one that counts."""
    return [args for name, args in final_stage() if name == instruction][-1]


def image_environment() -> dict[str, str]:
    pairs = [shlex.split(args) for name, args in final_stage() if name == "ENV"]
    return dict(pair.split("=", 1) for line in pairs for pair in line)


def field_of(variable: str) -> bool:
    """Whether a variable is a field of Settings; two underscores step into a nested model."""
    model: Any = Settings
    *path, last = variable.removeprefix(PREFIX).lower().split("__")
    for name in path:
        model = model.model_fields[name].annotation
        assert issubclass(model, BaseModel)
    return last in model.model_fields


def test_command_is_an_installed_script() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf8"))["project"]["scripts"]
    command = json.loads(arguments("CMD"))  # exec form: signals reach the process
    assert command == ["hardlook-serve"]
    module, _, function = scripts[command[0]].partition(":")
    assert callable(getattr(importlib.import_module(module), function))
    assert "command" not in service()
    assert "entrypoint" not in service()


def test_image_has_two_stages_and_the_second_starts_clean() -> None:
    stages = [args for name, args in instructions() if name == "FROM"]
    assert stages == ["python:3.11-slim-bookworm AS build", "python:3.11-slim-bookworm AS service"]
    assert [args.split()[0] for name, args in final_stage() if name == "COPY"] == ["--from=build"]


def test_user_is_not_root() -> None:
    assert int(arguments("USER").split(":")[0]) > 0
    assert "user" not in service()


def test_health_check_asks_a_route_that_exists() -> None:
    from service.app import create_app

    check = arguments("HEALTHCHECK")
    url = re.search(r"http://127\.0\.0\.1:(\d+)(/\w+)", check)
    assert url is not None
    assert url[1] == image_environment()["HARDLOOK_PORT"]
    assert url[2] in create_app(Settings()).openapi()["paths"]
    exec_form = json.loads(check[check.index("CMD ") + 4 :])
    assert exec_form[:2] == ["python", "-c"]
    compile(exec_form[2], "HEALTHCHECK", "exec")
    assert "healthcheck" not in service()  # the image's holds


@pytest.mark.parametrize("name", [*COMPOSE_FILES, "docker/Dockerfile"])
def test_every_variable_is_a_setting(name: str) -> None:
    variables = set(re.findall(rf"\b{PREFIX}[A-Z0-9_]+", (ROOT / name).read_text("utf8")))
    assert variables
    assert [variable for variable in sorted(variables) if not field_of(variable)] == []


def test_values_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {**image_environment(), **service()["environment"], **gpu_service()["environment"]}
    for variable, value in environment.items():
        default = re.fullmatch(r"\$\{\w+:-(.*)\}", value)
        if variable.startswith(PREFIX):
            monkeypatch.setenv(variable, default[1] if default else value)
    settings = Settings()
    assert settings.encoder == "hf-hub:chs20/FARE4-convnext_base_w-laion2B-s13B-b82K-augreg"
    assert str(settings.pools) == "/data/pools"


def gpu_service() -> dict[str, Any]:
    found: dict[str, Any] = compose("docker/compose.gpu.yml")["services"]["hardlook"]
    return found


def test_gpu_is_asked_for_in_the_overlay_alone() -> None:
    """`docker compose up` must start on a machine without one."""
    assert "deploy" not in service()
    assert "gpus" not in service()
    devices = gpu_service()["deploy"]["resources"]["reservations"]["devices"]
    assert devices == [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]


def test_what_is_written_goes_to_volumes_or_memory() -> None:
    found = service()
    assert found["read_only"] is True
    mounts = dict(volume.split(":") for volume in found["volumes"])
    assert set(mounts) == set(compose()["volumes"])
    assert set(mounts.values()) == set(json.loads(arguments("VOLUME")))
    environment = image_environment()
    assert {environment["HF_HOME"], environment["HARDLOOK_POOLS"]} == set(mounts.values())
    assert found["tmpfs"][0].split(":")[0] == environment["HOME"]


def test_build_command_in_the_comment_is_understood() -> None:
    from indexer.cli import _app

    text = (ROOT / "docker-compose.yml").read_text("utf8")
    comment = "\n".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    tokens = shlex.split(comment[comment.index("docker compose run") :].replace("\\\n", " "))
    tokens = tokens[tokens.index("hardlook-index") + 1 :]
    _, bound, _ = _app().parse_args(tokens, exit_on_error=False, print_error=False)
    assert str(bound.arguments["root"]) == image_environment()["HARDLOOK_POOLS"]
    assert bound.arguments["encoder"] in service()["environment"]["HARDLOOK_ENCODER"]


def test_port_is_published_on_loopback_alone() -> None:
    port = image_environment()["HARDLOOK_PORT"]
    assert service()["ports"] == [f"127.0.0.1:{port}:{port}"]
    assert arguments("EXPOSE") == port


def test_service_is_restarted_and_has_no_privileges() -> None:
    found = service()
    assert found["restart"] == "unless-stopped"
    assert found["cap_drop"] == ["ALL"]
    assert found["security_opt"] == ["no-new-privileges:true"]


def test_no_secret_is_written_down() -> None:
    for name in (*COMPOSE_FILES, "docker/Dockerfile"):
        text = (ROOT / name).read_text("utf8")
        assert not re.search(r"(?i)(key|token|password|secret)s?\b\s*[:=]", text), name


def test_build_context_holds_what_the_wheel_needs() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text("utf8").splitlines() if line.startswith("!")}
    assert kept == {
        "pyproject.toml", "constraints.txt", "README.md", "LICENSE", "perception", "indexer", "service", "offline",
    }  # fmt: skip
    assert all((ROOT / name).exists() for name in kept)
    assert service()["build"]["dockerfile"] == "docker/Dockerfile"
    declared = {args.split("=")[0] for name, args in instructions() if name == "ARG"}
    assert set(service()["build"]["args"]) == declared
