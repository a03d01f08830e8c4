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
from service.app import create_app
from service.settings import Settings, variable
from service.startup import load
from service.testing import toy_settings

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "api.md").read_text("utf8")
OPERATIONS = [
    ("post", "/classify"),
    ("post", "/similar"),
    ("get", "/pools"),
    ("get", "/metrics"),
    ("get", "/livez"),
    ("get", "/healthz"),
    ("get", "/startupz"),
    ("get", "/readyz"),
]


@pytest.fixture(scope="module")
def document(client: TestClient) -> dict[str, Any]:
    return dict(client.get("/openapi.json").json())


def test_routes(document: dict[str, Any]) -> None:
    assert [(method, path) for path, item in document["paths"].items() for method in item] == OPERATIONS


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_problems_are_documented_as_problems(document: dict[str, Any], method: str, path: str) -> None:
    responses = document["paths"][path][method]["responses"]
    for status, response in responses.items():
        media = "application/json" if status == "200" else problems.MEDIA_TYPE
        if path == "/metrics" and status == "200":
            media = "text/plain"
        assert list(response["content"]) == [media]
        if status != "200":
            assert response["content"][media]["schema"] == {"$ref": "#/components/schemas/Problem"}


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


@pytest.fixture(scope="module")
def described(root: Path, encoder: ToyEncoder) -> Iterator[BaseSchema]:
    """The document of a service that schemathesis itself keeps running."""
    load_all_checks()
    settings = toy_settings(root)
    config = SchemathesisConfig.from_path(ROOT / "schemathesis.toml")
    app = create_app(settings, load(settings, encoder))
    yield schemathesis.openapi.from_asgi("/openapi.json", app, config=config)
    asgi.shutdown_lifespans()


# What takes no input cannot be given a wrong one.
@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [(*operation, GenerationMode.POSITIVE) for operation in OPERATIONS]
    + [("post", "/classify", GenerationMode.NEGATIVE), ("post", "/similar", GenerationMode.NEGATIVE)],
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
