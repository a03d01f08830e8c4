"""The wire models: light to import, the same words as the service's own, and readable by an older client."""

import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import httpx
import pytest
from pydantic import ValidationError

from perception import encoder, policy_file
from service import wire
from tests.client.scripted import verdicts_body

ROOT = Path(__file__).parents[2]
WIRE = [f"service.{path.stem}" for path in sorted((ROOT / "service").glob("wire*.py"))]
HEAVY = (
    "torch",
    "faiss",
    "fastapi",
    "starlette",
    "numpy",
    "PIL",
    "pydantic_settings",
    "indexer",
    "open_clip",
    "sqlalchemy",
)


@pytest.mark.parametrize("module", [*WIRE, "service.client", "service.client.cli"])
def test_a_client_pays_for_httpx_and_pydantic_alone(module: str) -> None:
    code = f"import sys, {module}; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def test_words_are_those_of_the_service() -> None:
    assert get_args(wire.Precision) == get_args(encoder.Precision)
    assert get_args(wire.Norm) == get_args(policy_file.Norm)


def test_what_a_newer_service_adds_is_ignored() -> None:
    body = verdicts_body("safe")
    body["later"] = 1
    body["results"][0]["later"] = {"a": 1}
    assert wire.ClassifyAnswer.model_validate_json(json.dumps(body)).results[0].status == "ok"


def test_what_an_older_service_leaves_out_is_full() -> None:
    body = verdicts_body("safe")
    del body["results"][0]["detail"]
    result = wire.ClassifyAnswer.model_validate(body).results[0]
    assert isinstance(result, wire.ClassifyItem)
    assert result.detail == "full"


@pytest.mark.parametrize(
    ("image", "found"),
    [({}, "neither"), ({"data": "", "url": "https://a"}, "both"), ({"data": None, "url": None}, "neither")],
)
def test_an_image_has_one_source(image: dict[str, str | None], found: str) -> None:
    with pytest.raises(ValidationError, match=f"give either data or url; found {found}"):
        wire.ImageData.model_validate(image)


def test_either_source_will_do() -> None:
    for example in wire.ImageData.model_json_schema()["examples"]:
        wire.ImageData.model_validate(example)
    assert wire.ImageData.model_validate({"data": None, "url": "https://a"}).url == "https://a"
    with pytest.raises(ValidationError, match="at most 2048"):
        wire.ImageData(url="https://" + "a" * 2041)


def test_the_service_says_so(service: str) -> None:
    answer = httpx.post(f"{service}/classify", json={"images": [{"id": "a"}]}, trust_env=False)
    assert (answer.status_code, answer.json()["reason"]) == (400, "images.0: give either data or url; found neither")
