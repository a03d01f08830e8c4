"""OpenAPI of the routes that read their bodies themselves, and of problems."""

from typing import Annotated, Any

from fastapi import FastAPI, Path
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from service.intake import JSON, MULTIPART, RAW
from service.problems import MEDIA_TYPE
from service.settings import Scope, Settings
from service.wire import MAX_K, MAX_TEXT_CHARS, ClassifyBody, SimilarBody
from service.wire_adapters import ModerationBody
from service.wire_audits import ReplayBody
from service.wire_collections import (
    AddBody,
    ChangeBody,
    CreateBody,
    DryRunBody,
    PublishBody,
    RollbackBody,
    ShadowBody,
    SuppressBody,
)
from service.wire_curation import ProbeBody
from service.wire_explain import ExplainBody
from service.wire_jobs import JobBody
from service.wire_reviews import ClaimBody, DecideBody, FeedbackBody, StepBody

CollectionName = Annotated[str, Path(max_length=64, description="Of the collection.", examples=["pools"])]
# Snapshots that were built offline may have longer ids than what people add may have.
ExemplarId = Annotated[str, Path(max_length=MAX_TEXT_CHARS, description="It may hold slashes.", examples=["dog-0017"])]
# A text that the service takes has something besides white space.
NOT_BLANK = {"pattern": r"\S"}
_REF = "#/components/schemas/{model}"
_FORM_PARAMETERS = {
    "k": {"type": "integer", "minimum": 1, "maximum": MAX_K},
    "gallery": {"type": "string", "minLength": 1},
    "pool": {"type": "string", "enum": ["safe", "buffer", "unsafe"]},
    "min_similarity": {"type": "number", "minimum": -1, "maximum": 1},
    "text": {**NOT_BLANK, "type": "string", "description": "Instead of images."},
    "against": {"type": "string", "maxLength": MAX_TEXT_CHARS, "description": "Id of an exemplar to compare with."},
    "attribute": {"type": "boolean", "description": "false: the decision alone, without attributions."},
}


# What a caller needs for each route that asks who calls; None where any scope will do.
_SCOPES: dict[str, Scope | None] = {
    "/classify": "classify",
    "/similar": "similar",
    "/explain": "review",
    "/pools": None,
    "/metrics": "metrics",
    "/v1/moderations": "classify",
    "/adapters/pict-rs": "classify",
    "/collections": "pools:write",
    "/collections/{name}/exemplars": "pools:write",
    "/collections/{name}/exemplars/{id}": "pools:write",
    "/collections/{name}/suppressions": "pools:write",
    "/collections/{name}/versions": "pools:write",
    "/collections/{name}/rollback": "pools:write",
    "/collections/{name}/diff": "pools:write",
    "/collections/{name}/dry-run": "pools:write",
    "/collections/{name}/duplicates": "pools:write",
    "/collections/{name}/contradictions": "pools:write",
    "/collections/{name}/probes": "pools:write",
    "/collections/{name}/file": "pools:write",
    "/shadow": "pools:write",
    "/images/{sha256}": "review",  # or pools:write
    "/audits": "pools:write",
    "/audits/{id}/report": "pools:write",
    "/audits/{id}/replay": "pools:write",
    "/audit": "admin",
    "/audit/export": "admin",
    "/audit/verify": "admin",
    "/reviews": "review",
    "/reviews/{id}": "review",
    "/reviews/{id}/claim": "review",
    "/reviews/{id}/release": "review",
    "/reviews/{id}/decide": "review",
    "/reviews/{id}/skip": "review",
    "/feedback": "classify",
    "/jobs": "classify",
    "/jobs/{id}": "classify",
    "/jobs/{id}/results": "classify",
}
# Models of bodies that can only be JSON, for `json_request_body`.
_JSON_BODIES: tuple[type[BaseModel], ...] = (
    ModerationBody,
    AddBody,
    SuppressBody,
    ChangeBody,
    CreateBody,
    PublishBody,
    RollbackBody,
    DryRunBody,
    ShadowBody,
    ProbeBody,
    JobBody,
    ClaimBody,
    StepBody,
    DecideBody,
    FeedbackBody,
    ReplayBody,
)
_SECURITY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "An API key: `Authorization: Bearer hlk_...`"},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "An API key."},
    "basic": {
        "type": "http",
        "scheme": "basic",
        "description": "An API key in a URL: `https://anything:hlk_...@host/`",
    },
}


def _security(scope: Scope | None, settings: Settings) -> list[dict[str, list[str]]]:
    """Any way of sending a key, or none where callers without one have the scope."""
    anonymous = settings.anonymous_scopes or ()
    free = bool(anonymous) if scope is None else scope in anonymous or "admin" in anonymous
    ways: list[dict[str, list[str]]] = [{name: []} for name in _SECURITY_SCHEMES]
    return [*ways, {}] if free else ways


def one_subject(body_type: type[BaseModel], images: str) -> dict[str, Any]:
    """What a body must have: images, or a text in their place where it may have one."""
    if "text" not in body_type.model_fields:
        return {"required": [images]}
    return {"oneOf": [{"required": [images]}, {"required": ["text"]}]}


def request_body(body_type: type[BaseModel]) -> dict[str, Any]:
    """The three forms of a body, as `openapi_extra` of a route."""
    fields = {name: _FORM_PARAMETERS[name] for name in body_type.model_fields if name in _FORM_PARAMETERS}
    multipart = {
        "type": "object",
        "properties": {
            "image": {
                "type": "array",
                "items": {"type": "string", "format": "binary"},
                "minItems": 1,
                "description": "One or many files; parts of other names that have a file name are taken as well.",
            },
            **fields,
        },
        "additionalProperties": False,
        **one_subject(body_type, "image"),
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


def json_request_body(body_type: type[BaseModel], *, required: bool = True) -> dict[str, Any]:
    """A body that can only be JSON, as `openapi_extra` of a route; `_JSON_BODIES` must have the model."""
    schema = {"$ref": _REF.format(model=body_type.__name__)}
    return {"requestBody": {"required": required, "content": {JSON: {"schema": schema}}}}


def raw_request_body() -> dict[str, Any]:
    """A body that can only be one image file, as `openapi_extra` of a route."""
    raw = {"schema": {"type": "string", "format": "binary"}}
    return {"requestBody": {"required": True, "content": {RAW: raw, "image/*": raw}}}


def _limit(part: Any, settings: Settings, name: str = "") -> None:
    """Put the limits that the operator has set in place of those of the code: of `k`, wherever it is."""
    if isinstance(part, list):
        for inner in part:
            _limit(inner, settings, name)
    if not isinstance(part, dict):
        return
    if name == "k" and part.get("maximum") == MAX_K:
        part["maximum"] = settings.max_neighbors
    of_parameter = part.get("name") if "in" in part else None
    for key, inner in part.items():
        _limit(inner, settings, of_parameter or (name if key in ("anyOf", "schema") else key))


def _without_null(property: dict[str, Any]) -> dict[str, Any]:
    """An optional member as callers are to write it: left out rather than null, although null is understood."""
    kinds = [kind for kind in property.get("anyOf", []) if kind != {"type": "null"}]
    if len(kinds) != 1:
        return property
    return {**{name: value for name, value in property.items() if name != "anyOf"}, **kinds[0]}


def document(app: FastAPI, settings: Settings) -> None:
    """Add to the generated OpenAPI what FastAPI cannot know: bodies, keys, and the media type of problems."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            models = schema["components"]["schemas"]
            for body_type in (ClassifyBody, SimilarBody, ExplainBody):
                body = body_type.model_json_schema(ref_template=_REF) | one_subject(body_type, "images")
                if "text" in body["properties"]:
                    body["properties"]["text"] = NOT_BLANK | _without_null(body["properties"]["text"])
                if "images" in body["properties"]:
                    body["properties"]["images"] = _without_null(body["properties"]["images"])
                models.update(body.pop("$defs"))
                models[body_type.__name__] = body
            for json_type in _JSON_BODIES:
                body = json_type.model_json_schema(ref_template=_REF)
                models.update(body.pop("$defs", {}))
                models[json_type.__name__] = body
            for unused in ("HTTPValidationError", "ValidationError"):
                models.pop(unused, None)
            _limit(schema, settings)
            for route, path in schema["paths"].items():
                for operation in path.values():
                    _drop_what_fastapi_supposes(operation["responses"])
                    _name_problems(operation["responses"])
                    if settings.keys_file is not None and "401" in operation["responses"]:
                        operation["security"] = _security(_SCOPES[route], settings)
            if settings.keys_file is not None:
                schema["components"]["securitySchemes"] = _SECURITY_SCHEMES
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend it


def _drop_what_fastapi_supposes(responses: dict[str, Any]) -> None:
    """Of every route with parameters: a 422 of its own shape. Ours is a problem, and 400."""
    if "HTTPValidationError" in str(responses.get("422")):
        del responses["422"]


def _name_problems(responses: dict[str, Any]) -> None:
    for status, response in responses.items():
        if int(status) >= 400 and JSON in response.get("content", {}):
            response["content"] = {MEDIA_TYPE: response["content"][JSON]}
