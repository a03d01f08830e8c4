"""Drafts and entries: the canonical text, its hash, and what is never written."""

import hashlib
import json
from enum import StrEnum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from indexer.catalog.entry import GENESIS, MAX_BODY_BYTES, MAX_BODY_DEPTH, Draft, Entry
from indexer.errors import ContentsError

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
BODY = st.dictionaries(TEXT, JSON, max_size=5)


def entry(body: dict[str, Any], actor: str = "ann", seq: int = 7) -> Entry:
    return Entry("changes", seq, "2026-11-21T17:30:00.123456+00:00", "x.y", actor, "", "", "", "s", body, GENESIS, "")


def test_the_hash_is_what_the_documentation_says() -> None:
    """Written out by hand, so that an auditor without this program can do the same."""
    text = (
        '{"actor":"Ünï","body":{"a":[1,0.5,null,true],"ß":"\\n\\"\u2028"},"chain":"changes","collection":"",'
        '"kind":"x.y","reason":"","request_id":"","seq":7,"subject":"s","time":"2026-11-21T17:30:00.123456+00:00"}'
    )
    expected = hashlib.sha256(b"0" * 64 + b"\n" + text.encode()).hexdigest()
    assert entry({"ß": '\n"\u2028', "a": [1, 0.5, None, True]}, "Ünï").computed_hash() == expected


@given(BODY, TEXT)
def test_text_and_back_is_the_same_entry(body: dict[str, Any], actor: str) -> None:
    draft = Draft("x.y", actor, body=body)
    written = entry(json.loads(draft.body_json), actor)
    line = written.to_json_line()
    assert "\n" not in line
    read = Entry.from_json(json.loads(line))
    assert read == written
    assert read.to_json_line() == line
    assert read.computed_hash() == written.computed_hash()
    assert json.loads(draft.body_json) == body


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_are_kept_to_the_last_bit(value: float) -> None:
    back = json.loads(Draft("x", "ann", body={"f": value}).body_json)["f"]
    assert back.hex() == value.hex()


@given(BODY, BODY)
def test_other_bodies_have_other_hashes(a: dict[str, Any], b: dict[str, Any]) -> None:
    same = Draft("x", "ann", body=a).body_json == Draft("x", "ann", body=b).body_json
    assert (entry(a).computed_hash() == entry(b).computed_hash()) == same


def test_order_of_keys_is_no_difference() -> None:
    assert entry({"a": 1, "b": 2}).computed_hash() == entry({"b": 2, "a": 1}).computed_hash()


def test_every_value_is_in_the_hash() -> None:
    base = entry({"a": 1})
    changes = {
        "chain": "decisions", "seq": 8, "time": "", "kind": "z", "actor": "eve", "reason": "r", "request_id": "q",
        "collection": "c", "subject": "t", "body": {"a": 2}, "prev": "1" * 64,
    }  # fmt: skip
    hashes = {Entry.from_json(base.to_json() | {name: value}).computed_hash() for name, value in changes.items()}
    assert len(hashes | {base.computed_hash()}) == len(changes) + 1


def test_a_draft_is_what_it_was() -> None:
    body: dict[str, Any] = {"ids": ("a", "b")}
    draft = Draft("x", "ann", body=body)
    body["ids"] = "changed"
    assert json.loads(draft.body_json) == {"ids": ["a", "b"]}


class Kind(StrEnum):
    X = "x"


def nested(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(levels - 1):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"kind": ""}, "kind of an entry cannot be ''"),
        ({"kind": "A.b"}, "cannot be 'A.b'"),
        ({"kind": "a.b.c"}, "cannot be"),
        ({"kind": "a.b\n"}, "cannot be"),
        ({"kind": "a" * 33}, "cannot be"),
        ({"actor": "a\0b"}, "actor contains NUL"),
        ({"reason": "\0"}, "reason contains NUL"),
        ({"request_id": "\0"}, "request_id contains NUL"),
        ({"collection": "\0"}, "collection contains NUL"),
        ({"subject": "\0"}, "subject contains NUL"),
        ({"actor": "\ud800"}, "actor is not Unicode"),
        ({"subject": "\ud800"}, "subject is not Unicode"),
        ({"actor": Kind.X}, "actor must be text, got Kind"),
        ({"reason": None}, "reason must be text, got NoneType"),
        ({"actor": "a" * 4001}, "actor has 4001 characters, the limit is 4000"),
        ({"reason": "a" * 4001}, "reason has 4001 characters, the limit is 4000"),
        ({"request_id": "a" * 4001}, "request_id has 4001 characters, the limit is 4000"),
        ({"collection": "a" * 65}, "collection has 65 characters, the limit is 64"),
        ({"subject": "ü" * 1001}, "subject has 2002 bytes, the limit is 2000"),
        ({"body": []}, "must be a dict, got list"),
        ({"body": {"a": ["\0"]}}, "body of an entry contains NUL"),
        ({"body": {"a": {"\0": 1}}}, "a key that is not text without NUL"),
        ({"body": {"a": {1: 1}}}, "a key that is not text without NUL: 1"),
        ({"body": {"a": float("nan")}}, "not JSON"),
        ({"body": {"a": float("-inf")}}, "not JSON"),
        ({"body": {"a": {1, 2}}}, "not JSON"),
        ({"body": {"a": 10**5000}}, "not JSON"),
        ({"body": {"a": "\ud800"}}, "not JSON"),
        ({"body": nested(MAX_BODY_DEPTH + 1)}, "nested deeper than 64 levels"),
        ({"body": {"a": "b" * MAX_BODY_BYTES}}, r"has 16777224 bytes, the limit is 16777216"),
    ],
)  # fmt: skip
def test_what_is_never_written(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(ContentsError, match=match):
        Draft(**{"kind": "x", "actor": "ann"} | fields)


def test_limits_themselves_are_allowed() -> None:
    body = nested(MAX_BODY_DEPTH)
    Draft("a" * 32, "a" * 4000, "r" * 4000, "q" * 4000, "c" * 64, "ü" * 1000, body)
    assert len(Draft("x", "ann", body={"a": "b" * (MAX_BODY_BYTES - 8)}).body_json) == MAX_BODY_BYTES


def test_backslash_u_is_not_nul() -> None:
    assert json.loads(Draft("x", "ann", body={"a": "\\u0000"}).body_json) == {"a": "\\u0000"}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"more": 1}, "other fields"),
        ({"seq": True}, "seq of an entry must be int, got bool"),
        ({"seq": "1"}, "seq of an entry must be int, got str"),
        ({"body": []}, "body of an entry must be dict"),
        ({"prev": None}, "prev of an entry must be str"),
    ],
)
def test_what_is_no_entry(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ContentsError, match=match):
        Entry.from_json(entry({}).to_json() | change)
    with pytest.raises(ContentsError, match="other fields"):
        Entry.from_json({})
