"""The whole document against the running service, by schemathesis' own command with all of its checks."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from perception.testing import ToyEncoder
from service.testing import publish, toy_pools
from tests.api.test_every_route import ROUTES
from tests.journeys.servers import ROOT, Server, running
from tests.service.key_files import make


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("published")
    publish(root, ToyEncoder(), toy_pools())
    return root


@pytest.fixture(params=["open", "keys"])
def run(request: pytest.FixtureRequest, published: Path, tmp_path: Path) -> Iterator[tuple[Server, list[str]]]:
    """A service for everybody, and one that asks for keys; and how to call it."""
    if request.param == "open":
        with running(published, tmp_path) as server:
            yield server, []
    else:
        key = make(tmp_path / "keys.json", scopes=("admin",))
        with running(published, tmp_path, keys_file=tmp_path / "keys.json", fetch="true") as server:
            yield server, ["--header", f"Authorization: Bearer {key}"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_no_check_fails(run: tuple[Server, list[str]], tmp_path: Path, seed: int) -> None:
    server, headers = run
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(ROOT / "schemathesis.toml"), "run"]
    options = ["--checks", "all", "--max-examples", "40", "--seed", str(seed), "--no-color", *headers]
    address = f"{server.client.base_url}/openapi.json".replace("//openapi", "/openapi")
    result = subprocess.run([*command, address, *options], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert f"{len(ROUTES)} selected / {len(ROUTES)} total" in result.stdout
