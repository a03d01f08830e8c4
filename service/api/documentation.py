"""OpenAPI of the routes that read their bodies themselves, and of problems."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from service.intake import JSON, MULTIPART, RAW
from service.problems import MEDIA_TYPE
from service.schemas import ClassifyBody, SimilarBody

_REF = "#/components/schemas/{model}"
_FORM_PARAMETERS = {
    "k": {"type": "integer", "minimum": 1},
    "gallery": {"type": "string"},
    "pool": {"type": "string", "enum": ["safe", "buffer", "unsafe"]},
    "min_similarity": {"type": "number", "minimum": -1, "maximum": 1},
    "text": {"type": "string", "description": "Instead of images."},
}


def request_body(body_type: type[BaseModel]) -> dict[str, Any]:
    """The three forms of a body, as `openapi_extra` of a route."""
    fields = {name: _FORM_PARAMETERS[name] for name in body_type.model_fields if name in _FORM_PARAMETERS}
    multipart = {
        "type": "object",
        "properties": {
            "image": {
                "type": "array",
                "items": {"type": "string", "format": "binary"},
                "description": "One or many files; parts of other names that have a file name are taken as well.",
            },
            **fields,
        },
        "additionalProperties": False,
    }
    raw = {"schema": {"type": "string", "format": "binary"}}
    return {
        "requestBody": {
            "required": True,
            "content": {
                MULTIPART: {"schema": multipart},
                RAW: raw,
                "image/*": raw,
                JSON: {"schema": {"$ref": _REF.format(model=body_type.__name__)}},
            },
        }
    }


def document(app: FastAPI) -> None:
    """Add to the generated OpenAPI what FastAPI cannot know: bodies, and the media type of problems."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            models = schema["components"]["schemas"]
            for body_type in (ClassifyBody, SimilarBody):
                body = body_type.model_json_schema(ref_template=_REF)
                models.update(body.pop("$defs"))
                models[body_type.__name__] = body
            for unused in ("HTTPValidationError", "ValidationError"):
                models.pop(unused, None)
            for path in schema["paths"].values():
                for operation in path.values():
                    _name_problems(operation["responses"])
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend it


def _name_problems(responses: dict[str, Any]) -> None:
    for status, response in responses.items():
        if int(status) >= 400 and JSON in response.get("content", {}):
            response["content"] = {MEDIA_TYPE: response["content"][JSON]}
