"""Whatever the route, every error has the one shape, and every answer the same headers."""

from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from perception.testing import encoded, synthetic_image
from service.app import create_app
from service.settings import Settings
from tests.api.conftest import Start
from tests.api.test_error_shape import assert_problem
from tests.service.key_files import make

ROUTES = [
    (method.upper(), path)
    for path, operations in create_app(Settings()).openapi()["paths"].items()
    for method in operations
]
GUARDED = {"/classify": "classify", "/similar": "similar", "/pools": None, "/metrics": "metrics"}
PROBES = {"/livez", "/healthz", "/startupz", "/readyz"}
IMAGE: dict[str, Any] = {"content": encoded(synthetic_image(1)), "headers": {"content-type": "image/png"}}
HEADERS = {
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


def send(client: TestClient, method: str, path: str, **headers: str) -> Any:
    request = IMAGE if method == "POST" else {"headers": {}}
    return client.request(method, path, **{**request, "headers": {**request["headers"], **headers}})


def key_of(tmp_path: Path, *scopes: Any, **more: Any) -> str:
    return make(tmp_path / "keys.json", scopes=scopes, **more)


def test_every_route_is_known_to_these_tests() -> None:
    assert {path for _, path in ROUTES} == GUARDED.keys() | PROBES


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_another_method_is_a_problem(client: TestClient, method: str, path: str) -> None:
    for wrong in {"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"} - {method}:
        response = client.request(wrong, path)
        assert_problem(response, 405, "method-not-allowed")
        assert method in response.headers["allow"]


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_before_the_encoder_is_loaded(method: str, path: str) -> None:
    """The application without its life: nothing is loaded, and nothing ever will be."""
    client = TestClient(create_app(Settings()), raise_server_exceptions=False)
    response = send(client, method, path)
    if path in ("/livez", "/healthz"):
        assert response.json() == {"status": "alive"}
    else:
        assert_problem(response, 503, "not-ready")
        assert response.headers["retry-after"] == "1"


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_a_bug_anywhere_is_a_problem(start: Start, monkeypatch: pytest.MonkeyPatch, method: str, path: str) -> None:
    def bug(*_: Any, **__: Any) -> None:
        raise RuntimeError("a secret")

    client = start()
    for module in ("classify", "similar", "pools", "metrics", "health"):
        for name in ("caller_of", "runtime_of", "state_of"):
            monkeypatch.setattr(f"service.api.{module}.{name}", bug, raising=False)
    response = send(client, method, path)
    assert_problem(response, 500, "internal")
    assert "secret" not in response.text


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_keys_are_asked_for(start: Start, tmp_path: Path, method: str, path: str) -> None:
    other = key_of(tmp_path, "review")
    client = start(keys_file=tmp_path / "keys.json")
    if path in PROBES:
        assert send(client, method, path).status_code == 200
        assert send(client, method, path, **{"x-api-key": "nonsense"}).status_code == 200
        return
    response = send(client, method, path)
    assert_problem(response, 401, "unauthenticated")
    assert response.headers["www-authenticate"] == "Bearer"
    assert_problem(send(client, method, path, authorization="Bearer nonsense"), 401, "unauthenticated")
    scope = GUARDED[path]
    if scope is not None:
        response = send(client, method, path, authorization=f"Bearer {other}")
        assert_problem(response, 403, "forbidden", scope=scope)
    key = key_of(tmp_path, scope or "review")
    client = start(keys_file=tmp_path / "keys.json")
    assert send(client, method, path, authorization=f"Bearer {key}").status_code == 200
    assert send(client, method, path, **{"x-api-key": key}).status_code == 200


@pytest.mark.parametrize(("method", "path"), [r for r in ROUTES if r[1] in ("/classify", "/similar", "/pools")])
def test_rates_are_limited(start: Start, method: str, path: str) -> None:
    client = start(rate_limit="2/minute")
    assert [send(client, method, path).status_code for _ in range(2)] == [200, 200]
    response = send(client, method, path)
    assert_problem(response, 429, "rate-limited", limit="2 per 1 minute")
    assert 1 <= int(response.headers["retry-after"]) <= 60


@pytest.mark.parametrize(("method", "path"), [*ROUTES, ("GET", "/nope"), ("GET", "/openapi.json")])
def test_every_answer_has_the_security_headers(client: TestClient, method: str, path: str) -> None:
    for response in (send(client, method, path), client.request("DELETE", path)):
        assert {name: response.headers.get(name) for name in HEADERS} == HEADERS


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_other_origins_are_not_let_in(client: TestClient, method: str, path: str) -> None:
    asked = {"origin": "https://example.org", "access-control-request-method": method}
    for response in (client.options(path, headers=asked), send(client, method, path, **asked)):
        assert not [name for name in response.headers if name.startswith("access-control-")]
