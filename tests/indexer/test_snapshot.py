import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from indexer.backends.flat import FlatIndex
from indexer.contents import Contents, Exemplar
from indexer.errors import IndexerError, InvalidLabel, SnapshotError, UnknownExemplar
from indexer.snapshot import Snapshot, load_snapshot, write_snapshot
from perception.errors import FingerprintMismatch
from perception.verdict import DecisionPolicy, Neighbor, PoolLabel, VerdictLabel

Make = Callable[..., Contents]
Unit = Callable[..., NDArray[np.float32]]


def naive(contents: Contents, query: NDArray[np.float32], labels: set[str]) -> list[tuple[str, float]]:
    """Every exemplar of some labels by similarity in float64: (id, similarity)."""
    similarities = contents.embeddings.astype(float) @ query.astype(float)
    found = [(e.id, s) for e, s in zip(contents.exemplars, similarities, strict=True) if e.label in labels]
    return sorted(found, key=lambda hit: -hit[1])


def test_round_trip(make_contents: Make, tmp_path: Path, fingerprint: str) -> None:
    contents = make_contents()
    folder = write_snapshot(contents, tmp_path)
    snapshot = load_snapshot(folder, fingerprint)
    assert folder.name == snapshot.version == Snapshot.of(contents).version
    assert (snapshot.collection, snapshot.kind) == ("pools", "pools")
    assert (snapshot.encoder_name, snapshot.encoder_fingerprint) == ("toy/0", fingerprint)
    assert (len(snapshot), snapshot.dim) == (30, 12)
    assert snapshot.counts == {"buffer": 10, "safe": 10, "unsafe": 10}
    assert snapshot.exemplars == contents.exemplars
    assert np.array_equal(snapshot.contents().embeddings, contents.embeddings)
    assert snapshot.to_gallery().sha256 == contents.to_gallery().sha256
    assert snapshot.created_at.endswith("+00:00")
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


@pytest.mark.parametrize("collection", ["pools", "shop"])
def test_search_finds_what_a_naive_search_finds(make_contents: Make, unit: Unit, collection: str) -> None:
    contents = make_contents(collection, n=200)
    snapshot, queries = Snapshot.of(contents), unit(99, 5)
    every = set(contents.counts)
    for label in [None, *every]:
        found = snapshot.search(queries, 7, label=label)
        for neighbors, query in zip(found, queries, strict=True):
            expected = naive(contents, query, every if label is None else {label})[:7]
            assert [n.id for n in neighbors] == [id for id, _ in expected]
            assert [n.similarity for n in neighbors] == pytest.approx([s for _, s in expected], abs=1e-12)
            for neighbor in neighbors:
                home = snapshot.exemplar(neighbor.id).label if collection == "pools" else "shop"
                assert neighbor.pool == home


def test_search_each_gives_every_pool_its_turn(make_contents: Make, unit: Unit) -> None:
    contents = make_contents(n=100)
    snapshot, queries = Snapshot.of(contents), unit(98, 4)
    for neighbors, query in zip(snapshot.search_each(queries, 3), queries, strict=True):
        expected = [id for label in PoolLabel for id, _ in naive(contents, query, {label})[:3]]
        assert [n.id for n in neighbors] == expected
        assert [n.pool for n in neighbors] == ["safe"] * 3 + ["buffer"] * 3 + ["unsafe"] * 3
    gallery = Snapshot.of(make_contents("shop"))
    assert gallery.search_each(queries, 3) == gallery.search(queries, 3)


def test_rows_lead_to_exemplars_and_embeddings(make_contents: Make, unit: Unit) -> None:
    contents, query = make_contents(), unit(96, 1)
    snapshot = Snapshot.of(contents)
    for row, exemplar in enumerate(contents.exemplars):
        assert (snapshot.row_of(exemplar.id), row in snapshot.rows(exemplar.label)) == (row, True)
        found = snapshot.find(exemplar.id)
        assert found is not None
        assert found[0] == exemplar
        for embedding in (found[1], snapshot.embedding(exemplar.id)):
            assert np.array_equal(embedding, contents.embeddings[row])
            embedding[:] = 0  # a copy, as the next look shows
    assert (len(snapshot.rows()), snapshot.row_of("nobody"), snapshot.find("nobody")) == (30, None, None)
    assert np.array_equal(snapshot.embeddings([7, 3, 7]), contents.embeddings[[7, 3, 7]])
    assert snapshot.embeddings([]).shape == (0, 12)
    [hits], [neighbors] = snapshot.search_rows(query, 5, label="safe"), snapshot.search(query, 5, label="safe")
    assert [(snapshot.exemplars[row].id, similarity) for row, similarity in hits] == [
        (neighbor.id, neighbor.similarity) for neighbor in neighbors
    ]
    with pytest.raises(UnknownExemplar):
        snapshot.embedding("nobody")


def test_the_caller_chooses_the_index(make_contents: Make, tmp_path: Path, fingerprint: str, unit: Unit) -> None:
    class Keeping(FlatIndex):
        def embeddings_at(self, rows: Sequence[int]) -> NDArray[np.float32]:
            asked.append(len(rows))
            return super().embeddings_at(rows)

    asked: list[int] = []
    contents, queries = make_contents(), unit(95, 3)
    plain, folder = Snapshot.of(contents), write_snapshot(contents, tmp_path)
    for snapshot in (Snapshot.of(contents, Keeping), load_snapshot(folder, fingerprint, Keeping)):
        assert snapshot.version == plain.version
        assert snapshot.search_each(queries, 4) == plain.search_each(queries, 4)
        assert np.array_equal(snapshot.embedding("x007"), plain.embedding("x007"))
        assert np.array_equal(snapshot.contents().embeddings, contents.embeddings)
    assert asked == [1, 30] * 2


def test_search_each_is_enough_to_decide(make_contents: Make, unit: Unit) -> None:
    snapshot, queries = Snapshot.of(make_contents(n=100)), unit(97, 20)
    for policy in (DecisionPolicy(), DecisionPolicy(rule="vote", k=5)):
        few = snapshot.search_each(queries, policy.neighbors_needed)
        everything = snapshot.search_each(queries, 100)
        for some, all_ in zip(few, everything, strict=True):
            assert policy.decide(some).label == policy.decide(all_).label


@pytest.mark.parametrize("labels", [[], ["safe"], ["unsafe"], ["safe", "buffer"]])
def test_without_both_pools_the_verdict_is_review(labels: list[str], unit: Unit) -> None:
    exemplars = [Exemplar(str(i), label) for i, label in enumerate(labels)]
    snapshot = Snapshot.of(Contents.arrange("pools", "toy", "f", exemplars, unit(0, len(labels))))
    (neighbors,) = snapshot.search_each(unit(1, 1), 2)
    assert len(neighbors) == len(labels)
    assert DecisionPolicy().decide(neighbors).label is VerdictLabel.REVIEW


def test_an_image_in_two_pools_is_found_in_both(unit: Unit) -> None:
    embedding = np.repeat(unit(0, 1), 2, axis=0)
    exemplars = [Exemplar("a", "safe"), Exemplar("b", "unsafe")]
    snapshot = Snapshot.of(Contents.arrange("pools", "toy", "f", exemplars, embedding))
    (neighbors,) = snapshot.search_each(embedding[:1], 1)
    similarity = neighbors[0].similarity
    assert neighbors == [Neighbor("a", "safe", similarity), Neighbor("b", "unsafe", similarity)]
    assert similarity == pytest.approx(1.0, abs=1e-6)
    assert DecisionPolicy().decide(neighbors).label is VerdictLabel.UNSAFE


def test_unknown_labels_and_ids(make_contents: Make, unit: Unit) -> None:
    pools, gallery = Snapshot.of(make_contents()), Snapshot.of(make_contents("shop"))
    with pytest.raises(InvalidLabel, match="'neutral' is not one of safe, buffer, unsafe"):
        pools.search(unit(0, 1), 1, label="neutral")
    assert gallery.search(unit(0, 2), 1, label="neutral") == [[], []]
    with pytest.raises(UnknownExemplar, match=f"no exemplar 'nobody' in snapshot pools/{pools.version}"):
        pools.exemplar("nobody")


def test_another_encoder_is_refused_with_both_fingerprints(make_contents: Make, tmp_path: Path) -> None:
    folder = write_snapshot(make_contents(), tmp_path)
    with pytest.raises(FingerprintMismatch) as caught:
        load_snapshot(folder, "cd" * 32)
    assert f"snapshot pools/{folder.name}" in str(caught.value)
    assert "ab" * 32 in str(caught.value)
    assert "cd" * 32 in str(caught.value)
    assert len(load_snapshot(folder, None)) == 30


def test_version_is_a_hash_of_what_decides_an_answer(make_contents: Make, tmp_path: Path) -> None:
    contents = make_contents()
    versions = [
        Snapshot.of(changed).version
        for changed in (
            contents,
            make_contents(seed=1),
            make_contents(n=29),
            make_contents("shop"),
            make_contents(fingerprint="cd" * 32),
            replace(contents, exemplars=(replace(contents.exemplars[0], source="x"), *contents.exemplars[1:])),
        )
    ]
    assert len(set(versions)) == len(versions)
    first, second = tmp_path / "1", tmp_path / "2"
    for folder in (first, second):
        folder.mkdir()
    early = write_snapshot(contents, first, "2001-01-01T00:00:00+00:00")
    late = write_snapshot(contents, second)
    assert early.name == late.name == versions[0]
    for name in ("vectors.safetensors", "exemplars.jsonl"):
        assert (early / name).read_bytes() == (late / name).read_bytes()
    assert load_snapshot(early, None).created_at == "2001-01-01T00:00:00+00:00"


@pytest.mark.parametrize("name", ["manifest.json", "vectors.safetensors", "exemplars.jsonl"])
def test_every_flipped_byte_is_one_typed_error(make_contents: Make, tmp_path: Path, name: str) -> None:
    folder = write_snapshot(make_contents(n=6), tmp_path)
    good = (folder / name).read_bytes()
    rng = np.random.default_rng(0)
    step = 1 if name == "manifest.json" else 7
    for at in range(0, len(good), step):
        bad = bytearray(good)
        bad[at] ^= int(rng.integers(1, 256))
        (folder / name).write_bytes(bad)
        with pytest.raises(SnapshotError) as caught:
            load_snapshot(folder, None)
        assert str(folder) in str(caught.value)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def extend(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def make_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("name", ["manifest.json", "vectors.safetensors", "exemplars.jsonl"])
@pytest.mark.parametrize("damage", [Path.unlink, truncate, extend, make_a_folder], ids=lambda f: f.__name__)
def test_a_missing_or_cut_file_is_one_typed_error(
    make_contents: Make, tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    folder = write_snapshot(make_contents(), tmp_path)
    damage(folder / name)
    with pytest.raises(SnapshotError):
        load_snapshot(folder, None)


def test_a_renamed_folder_is_refused(make_contents: Make, tmp_path: Path) -> None:
    folder = write_snapshot(make_contents(), tmp_path)
    with pytest.raises(SnapshotError, match="does not fit"):
        load_snapshot(folder.rename(tmp_path / ("0" * 16)), None)


def test_files_of_two_snapshots_do_not_mix(make_contents: Make, tmp_path: Path) -> None:
    one, two = (write_snapshot(make_contents(seed=seed), tmp_path) for seed in (1, 2))
    shutil.copy(one / "vectors.safetensors", two / "vectors.safetensors")
    with pytest.raises(SnapshotError, match=r"vectors\.safetensors: is damaged"):
        load_snapshot(two, None)


@pytest.mark.parametrize(
    ("field", "value"),
    [("dim", 13), ("counts", {"safe": 30}), ("kind", "gallery"), ("format", "hardlook-snapshot-0"), ("files", {})],
)
def test_a_consistent_but_wrong_manifest_is_refused(
    make_contents: Make, tmp_path: Path, field: str, value: object
) -> None:
    """Hashes alone do not make a snapshot right: someone may have written them with a faulty tool."""
    from indexer import manifest as module

    folder = write_snapshot(make_contents(), tmp_path)
    fields = json.loads((folder / "manifest.json").read_text())
    for name in ("sha256", "created_at", "version"):
        del fields[name]
    fields[field] = value
    fields["version"] = module._digest(fields)[:16]
    fields["created_at"] = "2001-01-01T00:00:00+00:00"
    fields["sha256"] = module._digest(fields)
    (folder / "manifest.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    with pytest.raises(SnapshotError):
        load_snapshot(folder.rename(tmp_path / fields["version"]), None)


def test_a_full_disk_leaves_nothing_behind(
    make_contents: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        path.write_bytes(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("indexer.snapshot.write_file", full)
    with pytest.raises(OSError, match="No space"):
        write_snapshot(make_contents(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_writing_over_a_damaged_version_is_refused(make_contents: Make, tmp_path: Path) -> None:
    folder = write_snapshot(make_contents(), tmp_path)
    assert write_snapshot(make_contents(), tmp_path) == folder
    truncate(folder / "exemplars.jsonl")
    with pytest.raises(IndexerError):
        write_snapshot(make_contents(), tmp_path)


def test_gallery_outlives_its_snapshot(make_contents: Make) -> None:
    contents = make_contents(n=3000)
    gallery = Snapshot.of(contents).to_gallery()
    junk = [Snapshot.of(make_contents(n=3000, seed=seed)) for seed in range(3)]
    assert np.array_equal(gallery.embeddings, contents.embeddings)
    assert len(junk) == 3
