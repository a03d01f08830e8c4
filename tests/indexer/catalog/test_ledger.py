"""The catalogue: what edits do, that the log alone gives the same, that going back is exact, that writers agree."""

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import Connection

from indexer.catalog import chain
from indexer.catalog.clock import now
from indexer.catalog.edits import (
    Add,
    Annotate,
    Compact,
    Create,
    Delete,
    Disable,
    Enable,
    Move,
    Note,
    Publish,
    Rebase,
    Rollback,
)
from indexer.catalog.entry import Entry
from indexer.catalog.ledger import CHANGES, Catalog, EditRequest
from indexer.catalog.records import SUPPRESS, embedding_sha256
from indexer.catalog.situation import Edit
from indexer.contents import Exemplar
from indexer.errors import (
    ContentsError,
    EditRefused,
    ExemplarExists,
    InvalidLabel,
    ReviewTaken,
    UnknownExemplar,
)
from perception.errors import FingerprintMismatch
from tests.indexer.catalog.ledgers import STAMP, add, entries, make, published_base, unit


def test_every_kind_of_edit_says_who_what_and_why(catalog: Catalog) -> None:
    later = now() + timedelta(hours=1)
    made = make(
        catalog,
        Create("pools", STAMP),
        add("a", note="n"),
        add("b", "unsafe"),
        Move("pools", "a", "buffer"),
        Disable("pools", "a", later),
        Enable("pools", "a"),
        Disable("pools", "a", by="quarantine"),
        Enable("pools", "a"),
        Annotate("pools", "a", note="other", metadata={"category": "x"}),
        add("not-b", SUPPRESS, suppresses=("b",), min_similarity=0.9),
        Publish("pools", "good"),
        Note("pools", "retroactive.match", "a", {"n": 3}),
        Delete("pools", "b"),
    )
    assert [entry.kind for entry in entries(catalog)] == [
        "collection.create",
        "exemplar.add",
        "exemplar.add",
        "exemplar.move",
        "exemplar.disable",
        "exemplar.enable",
        "exemplar.quarantine",
        "exemplar.release",
        "exemplar.annotate",
        "exemplar.suppress",
        "version.publish",
        "retroactive.match",
        "exemplar.delete",
    ]
    assert {(e.actor, e.reason, e.request_id, e.collection) for e in entries(catalog)} == {
        ("ann", "since", "r1", "pools")
    }
    last = made[-1]
    assert last.entry is not None
    assert (last.entry.subject, last.entry.body["version"]) == ("b", last.state.version)
    record = catalog.state("pools").records["a"]
    assert record is not None
    assert (record.exemplar.label, record.note, record.disabled) == ("buffer", "other", None)
    assert catalog.state("pools").records["b"] is None
    with catalog.database.reading() as connection:
        assert not chain.verify(connection, CHANGES).problems


def test_asking_twice_is_asking_once(catalog: Catalog) -> None:
    make(catalog, Create("pools", STAMP), add("a"), Disable("pools", "a"))
    before = entries(catalog)
    again = [Create("pools", STAMP), Disable("pools", "a"), Move("pools", "a", "safe"), Annotate("pools", "a", note="")]
    assert [outcome.entry for outcome in make(catalog, *again)] == [None] * 4
    assert entries(catalog) == before
    make(catalog, add("b"))
    assert make(catalog, add("b"))[0].entry is None
    with pytest.raises(ExemplarExists):
        make(catalog, add("b", seed=9))
    image = Exemplar("c", "safe", sha256="0" * 64)
    make(catalog, Add("pools", image, unit(1), STAMP))
    assert make(catalog, Add("pools", image, unit(2), STAMP))[0].entry is None  # the same file, encoded again


REFUSED: list[tuple[Edit, type[Exception], str]] = [
    (Move("pools", "nobody", "safe"), UnknownExemplar, "nobody"),
    (Delete("pools", "nobody"), UnknownExemplar, "nobody"),
    (add("x", "doubtful"), InvalidLabel, "doubtful"),
    (Move("pools", "a", "doubtful"), InvalidLabel, "doubtful"),
    (add("x", "suppress"), InvalidLabel, "suppress"),
    (add("x", SUPPRESS, suppresses=("nobody",), min_similarity=0.9), UnknownExemplar, "nobody"),
    (add("x", SUPPRESS, suppresses=("a",), min_similarity=1.5), ContentsError, "1.5"),
    (add("x", "safe", note="n" * 5000), ContentsError, "4000"),
    (add("x", "safe", note="\ud800"), ContentsError, "Unicode"),
    (Disable("pools", "a", now() - timedelta(seconds=1)), EditRefused, "past"),
    (Rollback("pools", "0123456789abcdef"), EditRefused, "0123456789abcdef"),
    (Rollback("pools", 99), EditRefused, "99"),
    (Rollback("pools", "%"), EditRefused, "%"),
    (Compact("pools", "0" * 16, 99), EditRefused, "99"),
    (Add("pools", Exemplar("x", "safe"), unit(1)[:3], STAMP), ContentsError, r"\(3,\)"),
    (Add("pools", Exemplar("x", "safe"), 2 * unit(1), STAMP), ContentsError, "unit"),
    (Add("pools", Exemplar("x", "safe"), unit(1), replace(STAMP, fingerprint="other")), FingerprintMismatch, "other"),
    (Add("nowhere", Exemplar("x", ""), unit(1), STAMP), EditRefused, "create it first"),
]


@pytest.mark.parametrize(("edit", "error", "says"), REFUSED)
def test_what_makes_no_sense_is_refused_and_changes_nothing(
    catalog: Catalog, edit: Edit, error: type[Exception], says: str
) -> None:
    make(catalog, Create("pools", STAMP), add("a"))
    before = entries(catalog), catalog.state("pools")
    with pytest.raises(error, match=says):
        make(catalog, edit)
    assert (entries(catalog), catalog.state("pools")) == before


def test_a_group_is_made_whole_or_not_at_all(catalog: Catalog) -> None:
    make(catalog, Create("pools", STAMP), add("a"))
    before = catalog.state("pools")
    good, bad, after = [add("b"), add("c")], [Move("pools", "a", "unsafe"), Delete("pools", "nobody")], [add("d")]
    outcomes = catalog.apply([[EditRequest(edit, "ann") for edit in group] for group in (good, bad, after)])
    assert isinstance(outcomes[1], UnknownExemplar)
    assert set(catalog.state("pools").records) == {"a", "b", "c", "d"}
    assert catalog.state("pools").records["a"] == before.records["a"]
    assert [entry.seq for entry in entries(catalog)] == [1, 2, 3, 4, 5]
    assert catalog.replayed("pools") == catalog.state("pools")


def test_what_else_is_written_shares_the_fate_of_the_edit(catalog: Catalog) -> None:
    make(catalog, Create("pools", STAMP))
    seen: list[Entry | None] = []

    def refuse(connection: Connection, entry: Entry | None) -> None:
        seen.append(entry)
        raise ReviewTaken("1", "somebody else's")

    [refused] = catalog.apply([[EditRequest(add("a"), "ann", also=refuse)]])
    assert isinstance(refused, ReviewTaken)
    assert seen[0] is not None
    assert seen[0].subject == "a"
    assert "a" not in catalog.state("pools").records
    assert len(entries(catalog)) == 1


def test_going_back_gives_exactly_what_was(catalog: Catalog, tmp_path: Path) -> None:
    base = published_base(tmp_path, ("s", "safe"), ("u", "unsafe"))
    make(catalog, Rebase("pools", base, STAMP, 1), add("a", "unsafe"), Publish("pools", "first"))
    first = catalog.state("pools")
    make(catalog, Move("pools", "s", "buffer"), Delete("pools", "a"), Delete("pools", "u"))
    second = catalog.state("pools")
    other = published_base(tmp_path, ("t", "safe"))
    make(catalog, Rebase("pools", other, STAMP, 2))
    for to, expected in ((first.version, first), (second.version, second), (first.revision, first)):
        [outcome] = make(catalog, Rollback("pools", to))
        present = catalog.state("pools")
        assert (present.version, present.base, present.records) == (expected.version, expected.base, expected.records)
        assert outcome.entry is not None
        assert outcome.entry.body["to_version"] == expected.version
        assert present.history == 2  # what was published offline meanwhile is not taken for news
    assert make(catalog, Rollback("pools", first.version))[0].entry is None
    assert catalog.replayed("pools") == catalog.state("pools")


def test_going_back_looks_at_the_encoder_not_at_its_name(catalog: Catalog, tmp_path: Path) -> None:
    make(catalog, Rebase("pools", published_base(tmp_path, ("s", "safe")), STAMP, 1))
    first = catalog.state("pools")
    other = published_base(tmp_path, ("t", "safe"))
    make(catalog, Rebase("pools", other, replace(STAMP, name="the same by another name"), 2))
    make(catalog, Rollback("pools", first.version))
    assert catalog.state("pools").version == first.version
    make(catalog, Rebase("pools", other, replace(STAMP, fingerprint="other"), 3))
    with pytest.raises(EditRefused, match="another encoder"):
        make(catalog, Rollback("pools", first.version))


def test_a_base_exemplar_is_changed_without_its_snapshot(catalog: Catalog, tmp_path: Path) -> None:
    base = published_base(tmp_path, ("s", "safe"), ("u", "unsafe"))
    make(catalog, Rebase("pools", base, STAMP, 1))
    assert catalog.state("pools").version == base
    make(catalog, Move("pools", "s", "unsafe"))
    record = catalog.state("pools").records["s"]
    assert record is not None
    assert (record.exemplar.source, record.embedding_sha256) == ("s.png", embedding_sha256(unit(1000)))
    assert np.array_equal(catalog.embeddings([record.embedding_sha256])[record.embedding_sha256], unit(1000))
    make(catalog, Compact("pools", other := published_base(tmp_path, ("s", "unsafe")), catalog.state("pools").revision))
    assert (catalog.state("pools").base, catalog.state("pools").records) == (other, {})


def test_compaction_keeps_what_changed_meanwhile_and_what_no_snapshot_holds(catalog: Catalog) -> None:
    make(catalog, Create("pools", STAMP), add("a"), add("b"), add("c", note="n"), Disable("pools", "b"), add("d"))
    at = catalog.state("pools").revision
    make(catalog, Move("pools", "a", "buffer"), Delete("pools", "d"), add("e"))
    make(catalog, Compact("pools", "0123456789abcdef", at))
    present = catalog.state("pools")
    assert set(present.records) == {"a", "b", "c", "d", "e"}
    assert present.records["d"] is None
    assert catalog.replayed("pools") == present


def test_an_offline_publication_is_taken_over_once_and_keeps_what_was_changed_here(
    catalog: Catalog, tmp_path: Path
) -> None:
    base = published_base(tmp_path, ("s", "safe"))
    make(catalog, Rebase("pools", base, STAMP, 1), add("a", "unsafe"))
    assert make(catalog, Rebase("pools", base, STAMP, 1))[0].entry is None
    other = published_base(tmp_path, ("t", "safe"), ("u", "unsafe"))
    make(catalog, Rebase("pools", other, STAMP, 2))
    assert (catalog.state("pools").base, set(catalog.state("pools").records)) == (other, {"a"})
    with pytest.raises(FingerprintMismatch):
        make(catalog, Rebase("pools", base, replace(STAMP, fingerprint="other"), 3))
