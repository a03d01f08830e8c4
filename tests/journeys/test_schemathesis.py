"""The whole document against the running service, by schemathesis' own command with all of its checks."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from perception.testing import ToyEncoder
from service.testing import publish, toy_pools
from tests.api.every_route import ROUTES
from tests.journeys.servers import ROOT, Server, running
from tests.service.key_files import make


@pytest.fixture(params=["open", "keys", "postgresql"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Server, list[str]]]:
    """A service for everybody, one that asks for keys, one with its catalogue in PostgreSQL; and how to call it."""
    pools, headers = tmp_path / "pools", list[str]()
    settings: dict[str, Any] = {"anonymous_scopes": "admin"}
    publish(pools, ToyEncoder(), toy_pools(per_pool=40))  # more than it finds the time to delete
    if request.param == "keys":
        key = make(tmp_path / "keys.json", scopes=("admin",))
        headers, settings = ["--header", f"Authorization: Bearer {key}"], {"keys_file": str(tmp_path / "keys.json")}
        settings["fetch"] = "true"
    elif request.param == "postgresql":
        settings["catalog"] = request.getfixturevalue("postgres_url")
    with running(pools, tmp_path, **settings) as server:
        yield server, headers


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", [1, 2])
def test_no_check_fails(run: tuple[Server, list[str]], tmp_path: Path, seed: int) -> None:
    server, headers = run
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(ROOT / "schemathesis.toml"), "run"]
    options = ["--checks", "all", "--max-examples", "20", "--seed", str(seed), "--no-color", *headers]
    options += ["--exclude-checks", "use_after_free"]  # see schemathesis.toml, which "all" overrules
    address = f"{server.client.base_url}/openapi.json".replace("//openapi", "/openapi")
    result = subprocess.run([*command, address, *options], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert f"{len(ROUTES)} selected / {len(ROUTES)} total" in result.stdout
