"""The OpenAPI document: complete, with examples that hold, and true of what the service does."""

import base64
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis.openapi
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from schemathesis import BaseSchema, Case, GenerationMode
from schemathesis.checks import load_all_checks
from schemathesis.config import SchemathesisConfig
from schemathesis.python import asgi

from perception.testing import ToyEncoder
from service import problems, wire
from service.api.documentation import _JSON_BODIES
from service.app import create_app
from service.settings import Settings, variable
from service.startup import load
from service.testing import publish, toy_pools, toy_settings
from tests.api.conftest import Serve
from tests.api.every_route import GUARDED, samples

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "api.md").read_text("utf8")
OPERATIONS = [(method.lower(), path) for method, path in samples()]
# What is answered, where that is not JSON.
MEDIA = {
    ("get", "/metrics"): "text/plain",
    ("get", "/audit/export"): "application/x-ndjson",
    ("get", "/collections/{name}/file"): "application/octet-stream",
    ("get", "/images/{sha256}"): "image/jpeg",
    ("get", "/audits/{id}/report"): "text/html",
}


@pytest.fixture(scope="module")
def document(client: TestClient) -> dict[str, Any]:
    return dict(client.get("/openapi.json").json())


def test_routes(document: dict[str, Any]) -> None:
    found = [(method, path) for path, item in document["paths"].items() for method in item]
    assert sorted(found) == sorted(OPERATIONS)


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_problems_are_documented_as_problems(document: dict[str, Any], method: str, path: str) -> None:
    responses = document["paths"][path][method]["responses"]
    for status, response in responses.items():
        good = status in ("200", "202")
        media = MEDIA.get((method, path), "application/json") if good else problems.MEDIA_TYPE
        assert list(response["content"]) == [media]
        if not good:
            assert response["content"][media]["schema"] == {"$ref": "#/components/schemas/Problem"}


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_statuses_are_those_of_what_a_route_takes(document: dict[str, Any], method: str, path: str) -> None:
    operation = document["paths"][path][method]
    statuses = {int(status) for status in operation["responses"]}
    body = {408, 413, 415} if "requestBody" in operation else set()
    assert statuses & {408, 413, 415} == body
    assert (400 in statuses) == bool(body or operation.get("parameters"))
    assert (401 in statuses) == (path in GUARDED)
    assert (403 in statuses) == (GUARDED.get(path) is not None)
    assert {500, 503} <= statuses


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_everything_is_explained(document: dict[str, Any], method: str, path: str) -> None:
    operation = document["paths"][path][method]
    assert operation["summary"]
    assert operation["description"]
    for parameter in operation.get("parameters", []):
        assert parameter["name"] in path or parameter["schema"].get("description"), parameter


def test_the_models_of_bodies_are_those_of_the_code(document: dict[str, Any]) -> None:
    for model in _JSON_BODIES:
        assert document["components"]["schemas"][model.__name__]["additionalProperties"] is False


def test_bodies_are_documented_in_every_form(document: dict[str, Any]) -> None:
    for path in ("/classify", "/similar"):
        content = document["paths"][path]["post"]["requestBody"]["content"]
        assert set(content) == {"multipart/form-data", "application/octet-stream", "image/*", "application/json"}


def test_every_reference_leads_somewhere_and_no_schema_is_left_over(document: dict[str, Any]) -> None:
    references = set(re.findall(r"#/components/schemas/(\w+)", str(document)))
    assert references == set(document["components"]["schemas"])


def test_examples_are_sent_as_they_are(client: TestClient) -> None:
    [classify_example] = wire.ClassifyBody.model_json_schema()["examples"]
    assert client.post("/classify", json=classify_example).status_code == 200
    for example in wire.SimilarBody.model_json_schema()["examples"]:
        assert client.post("/similar", json=example).status_code == 200
    [problem] = wire.Problem.model_json_schema()["examples"]
    damaged = base64.b64decode(classify_example["images"][0]["data"])[:42]
    answer = client.post("/classify", content=damaged, headers={"content-type": "image/png"}).json()
    assert answer.keys() == problem.keys()
    assert (answer["type"], answer["title"], answer["status"]) == (problem["type"], problem["title"], problem["status"])


def test_examples_of_every_body_are_understood(serve: Serve, document: dict[str, Any]) -> None:
    client, sent = serve(), 0
    for (method, path), sample in samples().items():
        content = document["paths"][path][method.lower()].get("requestBody", {}).get("content", {})
        model = content.get("application/json", {}).get("schema", {}).get("$ref", "").rpartition("/")[2]
        examples = document["components"]["schemas"][model]["examples"] if model else []
        assert bool(examples) == bool(model), model
        for example in examples:
            response = client.request(method, sample.path, json=example)
            sent += 1
            # They may name what is not there, and fetching is off.
            assert response.status_code in (200, 202, 404, 409, 422), response.text
    assert sent >= len(_JSON_BODIES) + 2


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory, encoder: ToyEncoder) -> Iterator[BaseSchema]:
    """The document of a service that schemathesis itself keeps running, in which everybody may do everything."""
    load_all_checks()
    root = tmp_path_factory.mktemp("pools")
    publish(root, encoder, toy_pools())
    settings = toy_settings(root, anonymous_scopes=("admin",))
    config = SchemathesisConfig.from_path(ROOT / "schemathesis.toml")
    loaded = load(settings, encoder)
    yield schemathesis.openapi.from_asgi("/openapi.json", create_app(settings, loaded), config=config)
    asgi.shutdown_lifespans()
    loaded.close()


def takes_input(method: str, path: str) -> bool:
    """What takes none cannot be given a wrong one."""
    operation = create_app(Settings()).openapi()["paths"][path][method]
    return bool(operation.get("parameters")) or "application/json" in str(operation.get("requestBody"))


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [(*operation, GenerationMode.POSITIVE) for operation in OPERATIONS]
    + [(method, path, GenerationMode.NEGATIVE) for method, path in OPERATIONS if takes_input(method, path)],
)
def test_the_service_does_what_the_document_says(
    described: BaseSchema, method: str, path: str, mode: GenerationMode
) -> None:
    """All checks that schemathesis has."""

    @hypothesis_settings(max_examples=30, suppress_health_check=list(HealthCheck))
    @given(case=described[path][method.upper()].as_strategy(generation_mode=mode))
    def check(case: Case[Any]) -> None:
        case.call_and_validate()

    check()


def test_docs_name_every_route_and_setting() -> None:
    for _, path in OPERATIONS:
        assert path in DOCS
    for field in Settings.model_fields:
        assert f"`{variable(field)}`" in DOCS


def test_docs_name_every_problem() -> None:
    slugs = {kind.slug for kind in problems.KINDS.values()} | {"too-many-pixels", "not-found", "method-not-allowed"}
    for slug in slugs:
        assert f"`{slug}`" in DOCS
