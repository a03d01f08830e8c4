"""Whatever the route, every error has the one shape, and every answer the same headers."""

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any, get_args

import pytest
from fastapi.testclient import TestClient

import service.api
from service.app import create_app
from service.settings import Scope, Settings
from service.startup import load
from service.testing import publish, toy_pools, toy_settings
from tests.api.conftest import ToyClip
from tests.api.every_route import ALSO, GUARDED, LIMITED, PROBES, ROUTES, Route, Sample, prepared, samples
from tests.api.test_error_shape import assert_problem
from tests.service.key_files import make

HEADERS = {
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}
each_route = pytest.mark.parametrize(("method", "path"), ROUTES)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., TestClient]]:
    """Starts services over toy pools of their own."""
    opened = ExitStack()

    def started(**changes: Any) -> TestClient:
        folder = tmp_path_factory.mktemp("pools")
        publish(folder, ToyClip(), toy_pools())
        settings = toy_settings(folder, **changes)
        loaded = load(settings, ToyClip())
        opened.callback(loaded.close)
        return opened.enter_context(TestClient(create_app(settings, loaded), raise_server_exceptions=False))

    with opened:
        yield started


@pytest.fixture(scope="module")
def everybody(run: Callable[..., TestClient]) -> tuple[TestClient, dict[Route, Sample]]:
    """A service in which everybody may do everything, and requests for it."""
    client = run(anonymous_scopes=("admin",))
    return client, prepared(client)


@pytest.fixture(scope="module")
def keyed(
    run: Callable[..., TestClient], tmp_path_factory: pytest.TempPathFactory
) -> tuple[TestClient, dict[Route, Sample], Mapping[str, str]]:
    """A service that asks for keys, requests for it, and a key of each scope."""
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    keys = {scope: make(file, scope, (scope,)) for scope in get_args(Scope)}
    client = run(keys_file=file)
    caller, editor = ({"x-api-key": keys[scope]} for scope in ("classify", "pools:write"))
    return client, prepared(client, caller, editor), keys


def test_every_route_is_known_to_these_tests() -> None:
    assert {path for _, path in ROUTES} == GUARDED.keys() | PROBES
    assert set(samples()) == set(ROUTES)


@each_route
def test_another_method_is_a_problem(client: TestClient, method: str, path: str) -> None:
    allowed = {other for other, same in ROUTES if same == path}
    for wrong in {"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"} - allowed:
        response = client.request(wrong, samples()[method, path].path)
        assert_problem(response, 405, "method-not-allowed")
        assert set(response.headers["allow"].split(", ")) == allowed


@each_route
def test_before_the_encoder_is_loaded(method: str, path: str) -> None:
    """The application without its life: nothing is loaded, and nothing ever will be."""
    client = TestClient(create_app(Settings()), raise_server_exceptions=False)
    response = samples()[method, path].send(client, method)
    if path in ("/livez", "/healthz"):
        assert response.json() == {"status": "alive"}
    else:
        assert_problem(response, 503, "not-ready")
        assert response.headers["retry-after"] == "1"


@each_route
def test_everybody_is_answered_where_everybody_may(
    everybody: tuple[TestClient, dict[Route, Sample]], method: str, path: str
) -> None:
    client, requests = everybody
    sample = requests[method, path]
    response = sample.send(client, method)
    assert response.status_code == sample.status, response.text


@each_route
def test_a_bug_anywhere_is_a_problem(
    everybody: tuple[TestClient, dict[Route, Sample]], monkeypatch: pytest.MonkeyPatch, method: str, path: str
) -> None:
    def bug(*_: Any, **__: Any) -> None:
        raise RuntimeError("a secret")

    client, requests = everybody
    for module in pkgutil.iter_modules(service.api.__path__, "service.api."):
        for name in ("caller_of", "runtime_of", "state_of"):
            monkeypatch.setattr(importlib.import_module(module.name), name, bug, raising=False)
    response = requests[method, path].send(client, method)
    assert_problem(response, 500, "internal")
    assert "secret" not in response.text


@each_route
def test_keys_are_asked_for(
    keyed: tuple[TestClient, dict[Route, Sample], Mapping[str, str]], method: str, path: str
) -> None:
    client, requests, keys = keyed
    sample = requests[method, path]
    if path in PROBES:
        assert sample.send(client, method).status_code == 200
        assert sample.send(client, method, **{"x-api-key": "nonsense"}).status_code == 200
        return
    response = sample.send(client, method)
    assert_problem(response, 401, "unauthenticated")
    assert response.headers["www-authenticate"] == "Bearer"
    assert_problem(sample.send(client, method, authorization="Bearer nonsense"), 401, "unauthenticated")
    scope = GUARDED[path]
    for other in keys.keys() - {scope, "admin"} - ALSO.get(path, set()) if scope else ():
        response = sample.send(client, method, authorization=f"Bearer {keys[other]}")
        assert_problem(response, 403, "forbidden", scope=scope)
    response = sample.send(client, method, authorization=f"Bearer {keys[scope or 'review']}")
    assert response.status_code == sample.status, response.text
    for key in (keys[scope or "metrics"], keys["admin"]):  # what was asked for may be done by now
        assert sample.send(client, method, **{"x-api-key": key}).status_code not in (401, 403)


def test_rates_are_limited_where_the_document_says_so() -> None:
    paths = create_app(Settings()).openapi()["paths"]
    assert {(m, p) for m, p in ROUTES if "429" in paths[p][m.lower()]["responses"]} == LIMITED


@pytest.mark.parametrize(("method", "path"), sorted(LIMITED))
def test_rates_are_limited(
    run: Callable[..., TestClient], everybody: tuple[TestClient, dict[Route, Sample]], method: str, path: str
) -> None:
    client = run(rate_limit="2/minute", anonymous_scopes=("admin",))
    sample = everybody[1][method, path]
    assert 429 not in [sample.send(client, method).status_code for _ in range(2)]
    response = sample.send(client, method)
    assert_problem(response, 429, "rate-limited", limit="2 per 1 minute")
    assert 1 <= int(response.headers["retry-after"]) <= 60


@pytest.mark.parametrize(("method", "path"), [*ROUTES, ("GET", "/nope"), ("GET", "/openapi.json")])
def test_every_answer_has_the_security_headers(
    everybody: tuple[TestClient, dict[Route, Sample]], method: str, path: str
) -> None:
    client, requests = everybody
    sample = requests.get((method, path), Sample(path))
    for response in (sample.send(client, method), client.request("TRACE", sample.path)):
        assert {name: response.headers.get(name) for name in HEADERS} == HEADERS


@each_route
def test_other_origins_are_not_let_in(
    everybody: tuple[TestClient, dict[Route, Sample]], method: str, path: str
) -> None:
    client, requests = everybody
    sample = requests[method, path]
    asked = {"origin": "https://example.org", "access-control-request-method": method}
    for response in (client.options(sample.path, headers=asked), sample.send(client, method, **asked)):
        assert not [name for name in response.headers if name.startswith("access-control-")]
