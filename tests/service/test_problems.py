"""The table of problems: no exception without a row, no row that cannot be answered with."""

import inspect
import json
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

import pytest

from indexer.errors import IndexerError, SnapshotError
from perception.errors import ImageTooLarge, PerceptionError
from service.errors import RateLimited, ServiceError, WaitTooLong
from service.problems import KINDS, TYPE_PREFIX, extra_headers, kind_of, problem

ROOTS = (PerceptionError, IndexerError, ServiceError)
DUMMIES: dict[str, Any] = {
    "found": "GIF",
    "accepted": ("PNG",),
    "known": ("a",),
    "rows": (0,),
    "limit": 2,
    "actual": 3,
    "retry_after_s": 2.5,
    "expected_s": 40.1,
    "limit_s": 30.0,
}


def leaves(error: type[Exception]) -> Iterator[type[Exception]]:
    if not error.__subclasses__():
        yield error
    for child in error.__subclasses__():
        yield from leaves(child)


def an_instance(error: type[Exception]) -> Exception:
    if error.__init__ is Exception.__init__:
        return error("a message")
    names = list(inspect.signature(error).parameters)
    return error(**{name: DUMMIES.get(name, "word") for name in names})


LEAVES = [leaf for root in ROOTS for leaf in leaves(root)]


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda leaf: leaf.__name__)
def test_every_leaf_has_a_row_of_its_own_that_makes_a_problem(leaf: type[Exception]) -> None:
    assert leaf in KINDS
    body = problem(an_instance(leaf), "an-id")
    assert json.loads(json.dumps(body)) == body
    assert body["type"] == TYPE_PREFIX + KINDS[leaf].slug or leaf is ImageTooLarge
    assert 400 <= HTTPStatus(body["status"]) < 600
    assert body["request_id"] == "an-id"
    assert {"type", "title", "status", "detail", "instance"} <= body.keys()


def test_nothing_else_is_in_the_table() -> None:
    assert all(issubclass(error, ROOTS) for error in KINDS)


@pytest.mark.parametrize(
    ("quantity", "status", "slug"),
    [
        ("bytes", 413, "image-too-large"),
        ("pixels", 422, "too-many-pixels"),
        ("pixels over all frames", 422, "too-many-pixels"),
    ],
)
def test_too_large_is_said_of_bytes_and_of_pixels(quantity: str, status: int, slug: str) -> None:
    body = problem(ImageTooLarge(quantity, 10, 11), "an-id")
    assert (body["status"], body["type"]) == (status, TYPE_PREFIX + slug)
    assert (body["quantity"], body["limit"], body["actual"]) == (quantity, 10, 11)


def test_a_slug_has_one_status_and_one_title() -> None:
    meanings: dict[str, set[tuple[int, str]]] = {}
    for kind in KINDS.values():
        meanings.setdefault(kind.slug, set()).add((kind.status, kind.title))
    assert {slug: found for slug, found in meanings.items() if len(found) > 1} == {}


@pytest.mark.parametrize("error", [RuntimeError("secret"), SnapshotError("secret", "secret"), KeyError("secret")])  # type: ignore[arg-type]
def test_bugs_say_nothing_of_the_inside(error: Exception) -> None:
    body = problem(error, "an-id")
    assert body["status"] == 500
    assert "secret" not in str(body)


def test_a_subclass_has_the_row_of_its_class() -> None:
    class Special(SnapshotError):
        """Not in the table itself."""

    assert kind_of(Special("x", "y")) is KINDS[SnapshotError]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("status", "error", "headers"),
    [
        (200, None, {}),
        (401, None, {"WWW-Authenticate": "Bearer"}),
        (503, None, {"Retry-After": "1"}),
        (503, WaitTooLong(41.2, 30.0), {"Retry-After": "12"}),
        (503, WaitTooLong(30.1, 30.0), {"Retry-After": "1"}),
        (429, RateLimited("3 per 1 minute", 12.3), {"Retry-After": "13"}),
    ],
)
def test_headers_say_how_to_go_on(status: int, error: Exception | None, headers: dict[str, str]) -> None:
    assert extra_headers(status, error) == headers
