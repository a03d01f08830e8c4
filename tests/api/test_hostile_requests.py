"""What no client should send, to every route that takes it: always a problem, and never the service's own fault."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
from fastapi.testclient import TestClient

from perception.testing import ToyEncoder
from service.app import create_app
from service.settings import Settings
from service.startup import load
from service.testing import publish, toy_pools, toy_settings
from tests.api.every_route import ROUTES, Route, Sample, prepared, samples
from tests.api.test_error_shape import assert_problem

PATHS = create_app(Settings()).openapi()["paths"]


def parameters(route: Route, place: str) -> list[dict[str, Any]]:
    method, path = route
    found = PATHS[path][method.lower()].get("parameters", [])
    return [parameter for parameter in found if parameter["in"] == place]


def content_types(route: Route) -> list[str]:
    method, path = route
    return list(PATHS[path][method.lower()].get("requestBody", {}).get("content", {}))


ALL = samples()
JSON_ONLY = [route for route in ROUTES if content_types(route) == ["application/json"]]
WITH_BODY = [route for route in ROUTES if content_types(route)]
OPTIONAL = {("POST", f"/reviews/{{id}}/{step}") for step in ("claim", "release", "skip")}
WITH_QUERY = [route for route in ROUTES if parameters(route, "query")]
WITH_PATH = [route for route in ROUTES if parameters(route, "path")]
JSON = {"content-type": "application/json"}
Prepared = tuple[TestClient, dict[Route, Sample]]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., TestClient]]:
    """Starts services of toy pools, in which everybody may do everything, with small limits."""
    opened = ExitStack()

    def started(**changes: Any) -> TestClient:
        folder = tmp_path_factory.mktemp("pools")
        publish(folder, ToyEncoder(), toy_pools())
        settings = toy_settings(folder, anonymous_scopes=("admin",), max_body_bytes=100_000, **changes)
        loaded = load(settings, ToyEncoder())
        opened.callback(loaded.close)
        return opened.enter_context(TestClient(create_app(settings, loaded), raise_server_exceptions=False))

    with opened:
        yield started


@pytest.fixture(scope="module")
def everybody(start: Callable[..., TestClient]) -> Prepared:
    client = start()
    return client, prepared(client)


def send(everybody: Prepared, route: Route, **request: Any) -> Any:
    client, requests = everybody
    return replace(requests[route], request=request).send(client, route[0])


NOT_JSON = [
    b"{",
    b"[]",
    b"null",
    b'"text"',
    b"\xff\xfe",
    b'{"a": NaN}',
    b"[" * 50_000,
    b'{"\\ud800": 1}',
    b'{"reason": "\\ud800"}',
    b'{"reason": 1e400}',
    b'{"reason": ' + b"9" * 5000 + b"}",
]


@pytest.mark.parametrize("route", JSON_ONLY, ids=" ".join)
def test_what_is_no_sound_json_object_is_malformed(everybody: Prepared, route: Route) -> None:
    for content in NOT_JSON:
        response = send(everybody, route, content=content, headers=JSON)
        assert response.status_code == 400, content[:20]
        assert response.json()["type"].rpartition(":")[2] in ("malformed-body", "invalid-parameter")


@pytest.mark.parametrize("route", JSON_ONLY, ids=" ".join)
def test_unknown_members_are_refused(everybody: Prepared, route: Route) -> None:
    body = {**everybody[1][route].request.get("json", {}), "unheard-of": 1}
    assert_problem(send(everybody, route, json=body), 400, "invalid-parameter", name="unheard-of")


@pytest.mark.parametrize("route", JSON_ONLY, ids=" ".join)
def test_other_content_types_are_refused(everybody: Prepared, route: Route) -> None:
    for content_type in ("text/plain", "application/x-www-form-urlencoded", "application/jsonx", ""):
        response = send(everybody, route, content=b"{}", headers={"content-type": content_type})
        assert_problem(response, 415, "unsupported-body", accepted=["application/json"])


@pytest.mark.parametrize("route", WITH_BODY, ids=" ".join)
def test_bodies_have_a_bound_declared_or_not(everybody: Prepared, route: Route) -> None:
    media = content_types(route)[-1].replace("*", "png")
    for content in (b" " * 100_001, (b" " * 10_000 for _ in range(11))):
        response = send(everybody, route, content=content, headers={"content-type": media})
        assert_problem(response, 413, "body-too-large", limit=100_000)


@pytest.mark.parametrize("route", WITH_BODY, ids=" ".join)
def test_a_body_is_asked_for(everybody: Prepared, route: Route) -> None:
    required = PATHS[route[1]][route[0].lower()]["requestBody"]["required"]
    assert required == (route not in OPTIONAL)
    response = send(everybody, route)
    assert (400 <= response.status_code < 500) == required, response.text


@pytest.mark.parametrize("route", WITH_QUERY, ids=" ".join)
def test_unknown_query_parameters_are_refused(everybody: Prepared, route: Route) -> None:
    client, requests = everybody
    sample = requests[route]
    sign = "&" if "?" in sample.path else "?"
    response = replace(sample, path=f"{sample.path}{sign}unheard-of=1").send(client, route[0])
    assert_problem(response, 400, "invalid-parameter", name="unheard-of")


VALUES = ["", "\0", "a" * 5000, "-1", "0", str(2**53), str(2**63), "1e999", "nan", "\ud800", "%", "'"]


@pytest.mark.parametrize("route", WITH_QUERY, ids=" ".join)
def test_no_value_of_a_query_parameter_is_the_service_s_fault(everybody: Prepared, route: Route) -> None:
    client, requests = everybody
    sample = requests[route]
    path, _, query = sample.path.partition("?")
    present = dict(part.split("=") for part in query.split("&") if part)
    for parameter in parameters(route, "query"):
        for value in VALUES:
            asked = {**present, parameter["name"]: value}
            encoded = {name: text.encode(errors="surrogatepass") for name, text in asked.items()}
            response = replace(sample, path=path, request={**sample.request, "params": encoded}).send(client, route[0])
            assert response.status_code < 500, (parameter["name"], value[:20], response.text)
            assert str(response.status_code) in PATHS[route[1]][route[0].lower()]["responses"]


STRANGE = ["%00", "a%00b", "%ff", "%ed%a0%80", "%F0%9F%98%80", "..%2f..%2fetc%2fpasswd", "a" * 5000, "%25", "'--", "*"]


@pytest.mark.parametrize("route", WITH_PATH, ids=" ".join)
def test_strange_names_in_paths_are_not_found(everybody: Prepared, route: Route) -> None:
    client, requests = everybody
    sample = requests[route]
    plain, sign, query = sample.path.partition("?")
    parts = plain.split("/")
    places = [at for at, part in enumerate(route[1].split("/")) if part.startswith("{")]
    for at, value in ((at, value) for at in places for value in STRANGE):
        path = "/".join([*parts[:at], value, *parts[at + 1 :]])
        response = replace(sample, path=path + sign + query).send(client, route[0])
        assert response.status_code in (400, 404, 405), (path, response.text)
        assert response.headers["content-type"] == "application/problem+json"
        assert len(response.content) < 30_000


def texts(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where texts stand in a body."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in items:
        if isinstance(inner, str):
            yield (*path, name)
        yield from texts(inner, (*path, name))


def with_text(body: Any, path: tuple[Any, ...], text: str) -> Any:
    body = json.loads(json.dumps(body))
    inner = body
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = text
    return body


MORE: dict[str, dict[str, Any]] = {
    "/collections/{name}/exemplars": {"reason": "why"},
    "/collections/{name}/exemplars/{id}": {"label": "buffer", "source": "s", "metadata": {"k": "v"}, "reason": "why"},
    "/collections/{name}/versions": {"reason": "why"},
    "/collections/{name}/rollback": {"reason": "why"},
    "/collections/{name}/suppressions": {"source": "s", "note": "n", "metadata": {"k": "v"}, "reason": "why"},
    "/collections": {"reason": "why"},
    "/shadow": {"reason": "why"},
    "/reviews/{id}/claim": {"reason": "why"},
    "/reviews/{id}/release": {"reason": "why"},
    "/reviews/{id}/decide": {"label": "unsafe", "exemplar_id": "e", "note": "n", "reason": "why"},
    "/feedback": {"comment": "c", "request_id": "r"},
}


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def stored(request: pytest.FixtureRequest, start: Callable[..., TestClient]) -> Prepared:
    """A service over each database."""
    changes: dict[str, Any] = {}
    if request.param == "postgresql":
        server = request.getfixturevalue("postgres_server")
        server.execute("CREATE DATABASE hostile")
        changes["catalog"] = server.url("hostile")
    client = start(**changes)
    return client, prepared(client)


@pytest.mark.parametrize("route", JSON_ONLY, ids=" ".join)
def test_no_text_in_a_body_is_the_service_s_fault(stored: Prepared, route: Route) -> None:
    """PostgreSQL stores no NUL; an index takes no long text."""
    _, requests = stored
    body = {**requests[route].request.get("json", {}), **MORE.get(route[1], {})}
    if "items" in body:
        body["items"] = [{**body["items"][0], "source": "s", "note": "n", "metadata": {"k": "v"}}]
    documented = PATHS[route[1]][route[0].lower()]["responses"]
    found = list(texts(body))
    assert found
    for path in found:
        for text in ("\0", "a\0b", "", "ü" * 4000, "a" * 4001, "\N{PILE OF POO}", "%_'\"\\"):
            response = send(stored, route, json=with_text(body, path, text))
            assert response.status_code < 500, (path, text[:10], response.text[:300])
            assert str(response.status_code) in documented, (path, text[:10], response.text[:300])


@pytest.mark.parametrize("route", WITH_QUERY + WITH_PATH, ids=" ".join)
def test_no_nul_in_an_address_is_the_database_s_fault(stored: Prepared, route: Route) -> None:
    client, requests = stored
    sample = requests[route]
    for parameter in parameters(route, "query"):
        path = f"{sample.path}{'&' if '?' in sample.path else '?'}{parameter['name']}=a%00"
        assert replace(sample, path=path).send(client, route[0]).status_code < 500
    plain = sample.path.partition("?")[0].split("/")
    for at, part in enumerate(route[1].split("/")):
        if part.startswith("{"):
            path = "/".join([*plain[:at], "a%00", *plain[at + 1 :]])
            assert replace(sample, path=path).send(client, route[0]).status_code in (400, 404)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"revision": 2**53}, 409),
        ({"revision": 2**53 + 1}, 400),
        ({"revision": 2**63}, 400),
        ({"revision": 10**400}, 400),
        ({"revision": -1}, 400),
        ({"revision": True}, 400),
        ({"revision": 1.0}, 400),
        ({"revision": "1"}, 400),
        ({"version": ""}, 409),
        ({"version": "%" * 16}, 409),
    ],
    ids=str,
)
def test_revisions_at_the_extremes(stored: Prepared, body: dict[str, Any], status: int) -> None:
    content = json.dumps(body)
    response = send(stored, ("POST", "/collections/{name}/rollback"), content=content, headers=JSON)
    assert response.status_code == status, response.text
