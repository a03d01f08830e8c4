"""The container files agree with the package they run: read as text, since no container engine runs here."""

import importlib
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import tomllib
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from sqlalchemy import make_url

from service.keys import exposed_without_keys
from service.settings import Settings, read_settings
from service.tracing import flush_tracing

ROOT = Path(__file__).parents[2]
COMPOSE_FILES = (
    "docker-compose.yml",
    "docker/compose.gpu.yml",
    "docker/compose.keys.yml",
    "docker/compose.postgres.yml",
)
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


def commands_in_comments(name: str, start: str) -> list[list[str]]:
    """Commands of ours that the comments of a file tell people to type, from their name on; redirections dropped."""
    text = (ROOT / name).read_text("utf8")
    comments = "\n".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    found = [line[line.index(start) :] for line in comments.replace("\\\n", " ").splitlines() if start in line]
    return [shlex.split(line.partition(">")[0]) for line in found]


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


def test_health_check_asks_whether_the_process_is_alive() -> None:
    """Not whether it is ready: a container that waits for its first pools must not be restarted."""
    from service.app import create_app

    check = arguments("HEALTHCHECK")
    exec_form = json.loads(check[check.index("CMD ") + 4 :])
    assert exec_form[:2] == ["python", "-c"]
    compile(exec_form[2], "HEALTHCHECK", "exec")
    found = re.search(r"'127\.0\.0\.1', (\d+), .*'GET', '(/\w+)'", exec_form[2])
    assert found is not None
    assert found[1] == image_environment()["HARDLOOK_PORT"]
    assert found[2] == "/livez"
    assert found[2] in create_app(Settings()).openapi()["paths"]
    assert "healthcheck" not in service()  # the image's holds


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1), (None, 1)])
def test_health_check_tells_alive_from_not(status: int | None, code: int) -> None:
    check = arguments("HEALTHCHECK")
    script = json.loads(check[check.index("CMD ") + 4 :])[2]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert status is not None
            self.send_response(status)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.handle_request)
        if status is None:
            server.server_close()
        else:
            thread.start()
        script = script.replace(image_environment()["HARDLOOK_PORT"], str(server.server_port))
        environment = {**os.environ, "http_proxy": "http://192.0.2.1:9", "HTTP_PROXY": "http://192.0.2.1:9"}
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=False)
        if status is not None:
            thread.join()
    assert done.returncode == code


@pytest.mark.parametrize("name", [*COMPOSE_FILES, "docker/Dockerfile"])
def test_every_variable_is_a_setting(name: str) -> None:
    variables = set(re.findall(rf"\b{PREFIX}[A-Z0-9_]+", (ROOT / name).read_text("utf8")))
    assert variables
    assert [variable for variable in sorted(variables) if not field_of(variable)] == []


def accepted(monkeypatch: pytest.MonkeyPatch, *overlays: str) -> Settings:
    """The settings of the container, defaults of compose filled in."""
    environment = {**image_environment(), **service()["environment"]}
    for overlay in overlays:
        environment |= compose(overlay)["services"]["hardlook"]["environment"]
    for variable, value in environment.items():
        default = re.fullmatch(r"\$\{\w+:?-(.*)\}", value)
        if variable.startswith(PREFIX):
            monkeypatch.setenv(variable, default[1] if default else value)
    return read_settings(os.environ)


def test_values_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = accepted(monkeypatch, "docker/compose.gpu.yml")
    assert settings.encoder == "hf-hub:chs20/FARE4-convnext_base_w-laion2B-s13B-b82K-augreg"
    assert str(settings.pools) == "/data/pools"


def test_it_starts_without_keys_for_this_machine_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = accepted(monkeypatch)
    assert settings.host == "0.0.0.0"
    assert exposed_without_keys(settings) is None
    assert settings.anonymous_scopes == ("classify", "similar", "metrics")


def test_with_keys_nobody_is_anonymous(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = accepted(monkeypatch, "docker/compose.keys.yml")
    assert settings.anonymous_scopes == ()
    assert settings.keys_file is not None
    assert str(settings.keys_file.parent) in json.loads(arguments("VOLUME"))


@pytest.mark.parametrize("name", ["docker/compose.keys.yml", "docker/prometheus/prometheus.yml"])
def test_commands_for_keys_are_understood(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from service.cli import main

    [tokens] = commands_in_comments(name, "hardlook-serve keys create")
    file = tokens.index("--file") + 1
    keys_file = compose("docker/compose.keys.yml")["services"]["hardlook"]["environment"]["HARDLOOK_KEYS_FILE"]
    assert tokens[file] == keys_file
    tokens[file] = str(tmp_path / "keys.json")
    with suppress(SystemExit):
        main(tokens[1:])
    assert capsys.readouterr().out.startswith("hlk_")


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
    mounts = dict(volume.split(":") for volume in found["volumes"])
    assert set(mounts) <= set(compose()["volumes"])
    assert set(mounts.values()) == set(json.loads(arguments("VOLUME")))
    environment = image_environment()
    assert {environment["HF_HOME"], environment["HARDLOOK_POOLS"]} < set(mounts.values())
    made = " ".join(args for name, args in final_stage() if name == "RUN")
    assert [folder for folder in mounts.values() if folder not in made.split()] == []  # owned by the user
    assert found["tmpfs"][0].split(":")[0] == environment["HOME"]


def test_the_end_of_a_request_is_waited_for() -> None:
    settings = Settings()
    flush_s = inspect.signature(flush_tracing).parameters["timeout_s"].default
    needed_s = settings.shutdown_delay_s + settings.deadline_s + 1 + flush_s  # as service.cli waits
    assert int(service()["stop_grace_period"].removesuffix("s")) > needed_s


def test_the_overlay_names_the_database_of_the_profile() -> None:
    """Its host, its user, its database, and the secret that has its password."""
    overlay = compose("docker/compose.postgres.yml")["services"]["hardlook"]
    database = compose()["services"]["postgres"]
    environment = overlay["environment"]
    url = make_url(environment["HARDLOOK_CATALOG"])
    assert (url.host, url.password) == ("postgres", None)
    assert url.username == database["environment"]["POSTGRES_USER"]
    assert url.database == database["environment"]["POSTGRES_DB"]
    assert environment["HARDLOOK_CATALOG_PASSWORD_FILE"] == database["environment"]["POSTGRES_PASSWORD_FILE"]
    assert set(database["networks"]) <= set(overlay["networks"])
    assert overlay["depends_on"]["postgres"]["condition"] == "service_healthy"


def test_the_image_can_trace() -> None:
    installs = [args for name, args in instructions() if name == "RUN" and "pip install" in args]
    assert '".[service,otel,postgres]"' in installs[-1]


def test_build_command_in_the_comment_is_understood() -> None:
    from indexer.cli import _app

    [tokens] = commands_in_comments("docker-compose.yml", "hardlook-index build")
    _, bound, _ = _app().parse_args(tokens[1:], exit_on_error=False, print_error=False)
    assert str(bound.arguments["root"]) == image_environment()["HARDLOOK_POOLS"]
    assert bound.arguments["encoder"] in service()["environment"]["HARDLOOK_ENCODER"]


def test_port_is_published_on_loopback_alone() -> None:
    port = image_environment()["HARDLOOK_PORT"]
    assert service()["ports"] == [f"127.0.0.1:{port}:{port}"]
    assert arguments("EXPOSE") == port


CONTAINERS = sorted(compose()["services"])


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_is_confined(name: str) -> None:
    found = compose()["services"][name]
    assert found["restart"] == "unless-stopped"
    assert found["read_only"] is True
    assert found["cap_drop"] == ["ALL"]
    assert found["security_opt"] == ["no-new-privileges:true"]
    assert found["mem_limit"]
    assert found["pids_limit"] > 0
    assert set(found["logging"]["options"]) == {"max-size", "max-file"}
    assert not {"privileged", "cap_add", "network_mode", "pid", "ipc"} & set(found)
    assert not [volume for volume in found["volumes"] if "docker.sock" in volume]
    if name != "hardlook":  # whose user the image sets
        assert int(found["user"].split(":")[0]) > 0
        assert found["healthcheck"]["test"][0] == "CMD"


@pytest.mark.parametrize("name", CONTAINERS)
def test_ports_are_published_on_loopback_alone(name: str) -> None:
    assert all(port.startswith("127.0.0.1:") for port in compose()["services"][name].get("ports", []))


@pytest.mark.parametrize("name", CONTAINERS)
def test_what_is_mounted_exists(name: str) -> None:
    for volume in compose()["services"][name]["volumes"]:
        source, _, target = volume.partition(":")
        if source.startswith("."):
            assert (ROOT / source).is_dir(), source
            assert target.endswith(":ro"), volume
        else:
            assert source in compose()["volumes"]


def test_images_have_a_version() -> None:
    images = [found["image"] for found in compose()["services"].values() if "image" in found]
    assert len(images) == 3
    for image in images:
        _, _, tag = image.partition(":")
        assert re.match(r"v?\d+\.\d+", tag), image


def test_what_is_optional_has_a_profile() -> None:
    profiles = {name: found.get("profiles") for name, found in compose()["services"].items()}
    assert profiles == {
        "hardlook": None, "postgres": ["postgres"], "prometheus": ["monitoring"], "grafana": ["monitoring"],
    }  # fmt: skip


def test_the_database_is_reached_from_nowhere() -> None:
    found = compose()["services"]["postgres"]
    assert "ports" not in found
    assert [compose()["networks"][name]["internal"] for name in found["networks"]] == [True]
    assert found["environment"]["POSTGRES_PASSWORD_FILE"] == f"/run/secrets/{found['secrets'][0]}"
    assert set(compose()["secrets"]) == set(found["secrets"])


def test_no_secret_is_written_down() -> None:
    """A variable that is named after one holds the path of a file."""
    files = [path for path in (ROOT / "docker").rglob("*") if path.is_file() and path.suffix != ".key"]
    for path in (ROOT / "docker-compose.yml", *files):
        text = path.read_text("utf8")
        assert not re.search(r"hlk_[0-9a-f]{12}_", text), path
        for line in text.splitlines():
            named = re.search(r"(?i)(key|token|password|secret|credentials)\w*\s*[:=]\s*([^\s#]+)", line)
            if named and not line.lstrip().startswith("#"):
                assert re.match(r"/|\[|\{secretName:|false$", named[2]), f"{path}: {line.strip()}"


def test_build_context_holds_what_the_wheel_needs() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text("utf8").splitlines() if line.startswith("!")}
    assert kept == {
        "pyproject.toml", "constraints.txt", "README.md", "LICENSE", "perception", "indexer", "service", "offline",
    }  # fmt: skip
    assert all((ROOT / name).exists() for name in kept)
    assert service()["build"]["dockerfile"] == "docker/Dockerfile"
    declared = {args.split("=")[0] for name, args in instructions() if name == "ARG"}
    assert set(service()["build"]["args"]) == declared
