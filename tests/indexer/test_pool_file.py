import json
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors import safe_open

from indexer.catalog.edits import Annotate, Delete, Disable, Move
from indexer.catalog.edits import Note as LogNote
from indexer.catalog.records import SUPPRESS
from indexer.catalog.situation import Edit
from indexer.contents import POOL_LABELS, Contents, Exemplar
from indexer.errors import EditRefused, ExemplarExists, InvalidLabel, PoolFileError
from indexer.pool_file import (
    MAX_HEADER_BYTES,
    Header,
    PoolFile,
    export,
    parse_pool_file,
    read_pool_file,
    write_pool_file,
)
from indexer.pool_import import import_edits, merge
from indexer.snapshot import Snapshot
from perception.errors import FingerprintMismatch
from tests.indexer.edited import STAMP, Edited, edited

Make = Callable[..., Contents]
Unit = Callable[..., NDArray[np.float32]]


def data_of(pool_file: PoolFile) -> bytes:
    return b"".join(pool_file.chunks())


def same(left: Contents, right: Contents) -> bool:
    return (
        left.exemplars == right.exemplars
        and left.embeddings.tobytes() == right.embeddings.tobytes()
        and (left.collection, left.encoder_name, left.encoder_fingerprint)
        == (right.collection, right.encoder_name, right.encoder_fingerprint)
    )


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(
    seed=st.integers(0, 2**31),
    dim=st.integers(1, 9),
    rows=st.dictionaries(
        TEXT.filter(bool), st.tuples(st.integers(0, 2), TEXT, st.dictionaries(TEXT, TEXT, max_size=3)), max_size=12
    ),
    name=st.sampled_from(["pools", "shop"]),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_round_trip_is_exact(
    tmp_path: Path,
    unit: Unit,
    seed: int,
    dim: int,
    rows: dict[str, tuple[int, str, dict[str, str]]],
    name: str,
) -> None:
    exemplars = [
        Exemplar(id, POOL_LABELS[at], f"{at:064x}" if at else "", source, metadata)
        for id, (at, source, metadata) in rows.items()
    ]
    contents = Contents.arrange(name, "toy/ü", "ab" * 32, exemplars, unit(seed, len(rows), dim))
    made = export(Snapshot.of(contents))
    made = replace(made, notes={})
    path = tmp_path / "file.pool"
    write_pool_file(path, made)
    found = read_pool_file(path, "ab" * 32)
    assert same(found.contents, contents)
    assert found.header == made.header
    assert path.stat().st_size == made.size_bytes == len(data_of(found))
    assert data_of(found) == path.read_bytes() == data_of(made)
    assert same(parse_pool_file(path.read_bytes(), "body").contents, contents)
    with safe_open(path, framework="numpy") as file:  # what other programs read it with
        assert np.array_equal(file.get_tensor("embeddings"), contents.embeddings)
        lines = bytes(file.get_tensor("exemplars")).splitlines() if contents.exemplars else []
        assert [json.loads(line)["id"] for line in lines] == [e.id for e in contents.exemplars]


def test_notes_and_the_version_go_with_it(tmp_path: Path, make_contents: Make, unit: Unit) -> None:
    with edited(tmp_path) as pools:
        pools.publish(make_contents(n=6))
        pools.apply(
            Annotate("pools", "x001", note="a note"),
            pools.add("new", unit(9, 1)[0], "unsafe", "another"),
            Disable("pools", "x002"),
        )
        view = pools.view()
        made = export(view)
        assert parse_pool_file(data_of(made), "x").notes == {"new": "another", "x001": "a note"}
        assert (made.header.version, made.header.revision) == (view.version, view.revision)
        assert "x002" not in {e.id for e in made.contents.exemplars}
        assert data_of(export(pools.view())) == data_of(made)
        unsafe = export(view, "unsafe")
        assert unsafe.header.counts == {"buffer": 0, "safe": 0, "unsafe": 2}
        assert unsafe.header.label == "unsafe"
        assert parse_pool_file(data_of(unsafe), "x").notes == {"new": "another"}
        assert {e.id for e in export(view, "buffer").contents.exemplars} == {"x001", "x004"}
        with pytest.raises(InvalidLabel):
            export(view, "shop")


def test_a_label_that_nothing_carries(make_contents: Make) -> None:
    empty = export(Snapshot.of(make_contents("shop", 4)), "nothing")
    assert parse_pool_file(data_of(empty), "x").contents.embeddings.shape == (0, 12)


# --- damaged files -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(make_contents: Make) -> bytes:
    return data_of(export(Snapshot.of(make_contents(n=4))))


def test_every_changed_byte_is_found(sound: bytes) -> None:
    for at in range(len(sound)):
        damaged = bytearray(sound)
        damaged[at] ^= 1
        with pytest.raises(PoolFileError):
            parse_pool_file(bytes(damaged), "damaged")


@pytest.mark.parametrize("n", [0, 3, 8, 9, 100, -1])
def test_what_is_cut_off_is_found(sound: bytes, n: int) -> None:
    with pytest.raises(PoolFileError, match=r"cut off|no pool file"):
        parse_pool_file(sound[:n], "short")
    with pytest.raises(PoolFileError, match="cut off or damaged"):
        parse_pool_file(sound + b"x", "long")


def test_the_hash_is_checked_before_lines_are_read(sound: bytes) -> None:
    with pytest.raises(PoolFileError, match="sha256"):
        parse_pool_file(sound[:-2] + b"\xff\n", "x")


def header_of(sound: bytes) -> Header:
    return parse_pool_file(sound, "x").header


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": "hardlook-pool-2"}, "format 'hardlook-pool-2', expected 'hardlook-pool-1'"),
        ({"dim": 70_000}, "dim: Input should be less than or equal to 65536"),
        ({"dim": 0}, "dim: Input should be greater than or equal to 1"),
        ({"n": 10**9}, "n: Input should be less than or equal to 10000000"),
        ({"n": -1}, "n: Input should be greater"),
        ({"kind": "heap"}, "kind: Input should be"),
        ({"n": 5}, "its header says"),
        ({"version": "0" * 16}, "sha256"),
    ],
)
def test_headers_are_checked(sound: bytes, changes: dict[str, object], said: str) -> None:
    header = header_of(sound)
    body = sound[len(header.to_bytes()) :]
    with pytest.raises(PoolFileError, match=said):
        parse_pool_file(replace(header, **changes).to_bytes() + body, "x")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [
        b"[]",
        b"{}",
        b'{"__metadata__":3}',
        b'{"__metadata__":{"hardlook-pool":3}}',
        b"[" * 100_000,
        b"\xff",
        b"1" * 9999,
    ],
    ids=range(7),
)
def test_what_is_no_header(text: bytes) -> None:
    with pytest.raises(PoolFileError):
        parse_pool_file(len(text).to_bytes(8, "little") + text + b"body", "x")


def test_sizes_are_bounded(tmp_path: Path, sound: bytes) -> None:
    path = tmp_path / "file.pool"
    path.write_bytes(sound)
    with pytest.raises(PoolFileError, match=f"has {len(sound)} bytes, the limit is 100"):
        read_pool_file(path, max_bytes=100)
    with path.open("wb") as file:  # sparse
        file.write(struct.pack("<Q", MAX_HEADER_BYTES + 1))
        os.truncate(file.fileno(), MAX_HEADER_BYTES + 100)
    with pytest.raises(PoolFileError, match=f"its header has {MAX_HEADER_BYTES + 1} bytes, the limit is"):
        read_pool_file(path)
    with pytest.raises(PoolFileError, match="No such file"):
        read_pool_file(tmp_path / "absent")


def rehashed(pool_file: PoolFile, **changes: object) -> bytes:
    """A file that is as it was written, by a program that writes nonsense."""
    header, data = replace(pool_file.header, **changes), data_of(pool_file)  # type: ignore[arg-type]
    body = data[len(pool_file.header.to_bytes()) :]
    digest = header.digest()
    digest.update(body)
    return replace(header, sha256=digest.hexdigest()).to_bytes() + body


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"collection": "../x"}, "invalid collection name"),
        ({"encoder_fingerprint": ""}, "fingerprint is empty"),
        ({"counts": {"safe": 4}}, "its header differs"),
        ({"label": "safe"}, "other labels than 'safe'"),
        ({"kind": "gallery"}, "kind and counts"),
    ],
)
def test_parts_that_do_not_fit_are_refused(make_contents: Make, changes: dict[str, object], said: str) -> None:
    with pytest.raises(PoolFileError, match=said):
        parse_pool_file(rehashed(export(Snapshot.of(make_contents(n=4))), **changes), "x")


def test_another_encoder_is_refused_by_both_names(sound: bytes) -> None:
    with pytest.raises(FingerprintMismatch) as caught:
        parse_pool_file(sound, "x", "cd" * 32)
    assert (caught.value.expected, caught.value.found) == ("cd" * 32, "ab" * 32)


def test_a_write_that_fails_leaves_nothing(
    tmp_path: Path, make_contents: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = export(Snapshot.of(make_contents(n=4)))
    path = tmp_path / "file.pool"
    path.write_bytes(b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("indexer.pool_file.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_pool_file(path, made)
    assert [p.name for p in tmp_path.iterdir()] == ["file.pool"]
    assert path.read_bytes() == b"old"


# --- import --------------------------------------------------------------------------------------------------------


def source(make_contents: Make, n: int = 6, seed: int = 0, notes: dict[str, str] | None = None) -> PoolFile:
    made = export(Snapshot.of(make_contents(n=n, seed=seed)))
    return replace(made, notes=notes or {})


def kinds(edits: list[Edit]) -> list[str]:
    return [type(edit).__name__ for edit in edits]


def test_into_nothing_and_again(tmp_path: Path, make_contents: Make) -> None:
    file = source(make_contents, notes={"x001": "seen"})
    with edited(tmp_path) as pools:
        live = pools.view
        pools.create()
        edits = import_edits(file, live(), "refuse")
        assert kinds(edits) == ["Note", *["Add"] * 6]
        pools.apply(*edits)
        assert same(live().contents(), file.contents)
        assert export(live()).notes == {"x001": "seen"}
        assert import_edits(file, live(), "refuse") == []
        assert import_edits(replace(file, notes={}), live(), "replace") == []  # a note is not taken away


def test_the_collection_is_created_where_there_is_none(make_contents: Make, tmp_path: Path) -> None:
    from indexer.catalog.clock import now
    from indexer.catalog.state import State
    from indexer.live.view import View

    with edited(tmp_path) as pools:
        empty = View(State("pools", STAMP), None, {}, now(), STAMP)
        pools.apply(*import_edits(source(make_contents), empty, "refuse"))
        assert pools.view().counts == {"buffer": 2, "safe": 2, "unsafe": 2}


def conflicting(pools: Edited, make_contents: Make, unit: Unit) -> None:
    """Under the ids of a file: equal, moved, of another image, disabled, a suppress item; and one that it lacks."""
    from indexer.catalog.edits import Add

    pools.publish(make_contents(n=4))
    row = unit(77, 3)
    pools.apply(
        Move("pools", "x001", "safe"),
        Delete("pools", "x002"),
        pools.add("x002", row[0], "unsafe", "mine"),
        Disable("pools", "x002"),
        Annotate("pools", "x003", source="elsewhere"),
        Add("pools", Exemplar("x004", SUPPRESS), row[1], STAMP, suppresses=("x000",), min_similarity=0.9),
        pools.add("other", row[2]),
    )


def test_conflicts_are_skipped_refused_or_replaced(tmp_path: Path, make_contents: Make, unit: Unit) -> None:
    file = source(make_contents)
    with edited(tmp_path) as pools:
        conflicting(pools, make_contents, unit)
        with pytest.raises(ExemplarExists):
            import_edits(file, pools.view(), "refuse")
        assert [e.exemplar.id for e in import_edits(file, pools.view(), "skip") if hasattr(e, "exemplar")] == ["x005"]
        edits = import_edits(file, pools.view(), "replace")
        pools.apply(*edits)
        after = pools.view()
        for exemplar, embedding in zip(file.contents.exemplars, file.contents.embeddings, strict=True):
            assert after.exemplar(exemplar.id) == exemplar
            assert after.embedding(exemplar.id).tobytes() == embedding.tobytes()
        assert not after.is_active("x002")  # it stays disabled
        record = after.record("x002")
        assert record is not None
        assert record.note == "mine"
        assert after.exemplar("other").label == "safe"
        assert import_edits(file, after, "refuse") == []
        assert sum(isinstance(edit, LogNote) for edit in edits) == 1


def test_a_note_is_added_where_there_is_none(tmp_path: Path, make_contents: Make) -> None:
    with edited(tmp_path) as pools:
        pools.publish(make_contents(n=6))
        pools.apply(Annotate("pools", "x002", note="mine"))
        file = source(make_contents, notes={"x001": "theirs", "x002": "theirs"})
        assert kinds(import_edits(file, pools.view(), "skip")) == ["Note", "Annotate"]
        with pytest.raises(ExemplarExists, match="x002"):
            import_edits(file, pools.view(), "refuse")
        pools.apply(*import_edits(file, pools.view(), "replace"))
        assert export(pools.view()).notes == {"x001": "theirs", "x002": "theirs"}


@pytest.mark.parametrize("on_conflict", ["skip", "replace"])
def test_a_merged_base_and_the_edits_that_are_left_make_what_edits_alone_make(
    tmp_path: Path, make_contents: Make, unit: Unit, on_conflict: str
) -> None:
    file = source(make_contents, n=9, notes={"x000": "a", "x007": "b", "x008": "c"})
    answers = []
    for name, by_merging in (("edits", False), ("merged", True)):
        (tmp_path / name).mkdir()
        with edited(tmp_path / name) as pools:
            conflicting(pools, make_contents, unit)
            pools.apply(Delete("pools", "x000"))
            if by_merging:
                before = len(pools.state.records)
                pools.publish(merge(file, pools.view(), on_conflict))  # type: ignore[arg-type]
                assert len(pools.state.records) == before
            pools.apply(*import_edits(file, pools.view(), on_conflict))  # type: ignore[arg-type]
            view = pools.view()
            assert import_edits(file, view, on_conflict) == []  # type: ignore[arg-type]
            answers.append((data_of(replace(export(view), header=file.header)), view.search(unit(1, 3), 20)))
            assert pools.catalog.replayed("pools") == pools.state
    assert answers[0] == answers[1]


def test_a_refused_merge(tmp_path: Path, make_contents: Make, unit: Unit) -> None:
    with edited(tmp_path) as pools:
        conflicting(pools, make_contents, unit)
        with pytest.raises(ExemplarExists):
            merge(source(make_contents), pools.view(), "refuse")
        new = Contents.arrange("pools", "toy/0", "ab" * 32, [Exemplar("fresh", "safe")], unit(8, 1))
        merged = merge(export(Snapshot.of(new)), pools.view(), "refuse")
        assert {e.id for e in merged.exemplars} == {"x000", "x001", "x003", "other", "fresh"}


def test_what_does_not_belong_there_is_refused(tmp_path: Path, make_contents: Make, unit: Unit) -> None:
    with edited(tmp_path) as pools:
        pools.publish(make_contents(n=3))
        other = export(Snapshot.of(make_contents(n=3, fingerprint="cd" * 32)))
        shop = export(Snapshot.of(make_contents("shop", 3)))
        for take in (import_edits, merge):
            with pytest.raises(FingerprintMismatch) as caught:
                take(other, pools.view(), "skip")
            assert (caught.value.expected, caught.value.found) == ("ab" * 32, "cd" * 32)
            with pytest.raises(EditRefused, match="moderation collection, and the file is of a gallery"):
                take(shop, pools.view(), "skip")
    with edited(tmp_path, "shop") as shops:
        shops.publish(make_contents("shop", 3))
        bad = Contents.arrange("shop", "toy/0", "ab" * 32, [Exemplar("s", SUPPRESS)], unit(8, 1))
        with pytest.raises(EditRefused, match="suppress"):
            merge(export(Snapshot.of(bad)), shops.view(), "skip")
        renamed = export(Snapshot.of(make_contents("market", 5)))
        shops.apply(*import_edits(renamed, shops.view(), "refuse"))
        assert len(shops.view()) == 5
