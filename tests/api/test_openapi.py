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
from schemathesis.checks import not_a_server_error
from schemathesis.python import asgi
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from perception.testing import ToyEncoder
from service import problems, schemas
from service.app import create_app, load
from service.settings import Settings, variable
from service.testing import toy_settings

DOCS = (Path(__file__).parents[2] / "docs" / "api.md").read_text("utf8")
OPERATIONS = [
    ("post", "/classify"),
    ("post", "/similar"),
    ("get", "/pools"),
    ("get", "/healthz"),
    ("get", "/readyz"),
]
# What the document promises of every answer. Not among them: that every body of the right form is accepted, since
# random bytes are no image.
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    unsupported_method,
    negative_data_rejection,
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
    [classify_example] = schemas.ClassifyBody.model_json_schema()["examples"]
    assert client.post("/classify", json=classify_example).status_code == 200
    for example in schemas.SimilarBody.model_json_schema()["examples"]:
        assert client.post("/similar", json=example).status_code == 200
    [problem] = schemas.Problem.model_json_schema()["examples"]
    damaged = base64.b64decode(classify_example["images"][0]["data"])[:42]
    answer = client.post("/classify", content=damaged, headers={"content-type": "image/png"}).json()
    assert answer.keys() == problem.keys()
    assert (answer["type"], answer["title"], answer["status"]) == (problem["type"], problem["title"], problem["status"])


@pytest.fixture(scope="module")
def described(root: Path, encoder: ToyEncoder) -> Iterator[BaseSchema]:
    """The document of a service that schemathesis itself keeps running."""
    # A limit that no generated body reaches: schemathesis takes a 413 for an accepted body.
    settings = toy_settings(root, max_images_per_request=1000)
    yield schemathesis.openapi.from_asgi("/openapi.json", create_app(settings, load(settings, encoder)))
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
    @hypothesis_settings(max_examples=30, suppress_health_check=list(HealthCheck))
    @given(case=described[path][method.upper()].as_strategy(generation_mode=mode))
    def check(case: Case[Any]) -> None:
        case.call_and_validate(checks=CHECKS)

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
