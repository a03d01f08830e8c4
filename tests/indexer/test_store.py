import json
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from indexer.contents import Contents
from indexer.errors import InvalidName, SnapshotError, UnknownCollection, UnknownVersion
from indexer.snapshot import Snapshot, write_snapshot
from indexer.store import SnapshotStore, collections
from perception.errors import FingerprintMismatch

Make = Callable[..., Contents]


@pytest.fixture
def store(tmp_path: Path) -> SnapshotStore:
    return SnapshotStore(tmp_path / "data" / "collections", "pools")


def test_publish_and_load(store: SnapshotStore, make_contents: Make, fingerprint: str) -> None:
    version = store.publish(make_contents())
    assert store.current_version() == version == store.load(fingerprint).version == store.manifest().version
    assert store.versions() == (version,)
    assert store.verify() == ()
    assert collections(store.root) == {"pools": "pools"}


def test_opening_a_store_creates_nothing(store: SnapshotStore) -> None:
    assert store.versions() == ()
    assert store.history() == ()
    with pytest.raises(UnknownCollection, match="unknown collection 'pools'; published: none"):
        store.current_version()
    for act in (store.load, lambda _: store.rollback(), lambda _: store.verify()):
        with pytest.raises(UnknownCollection):
            act(None)
    assert not store.root.exists()


def test_publish_what_is_current_changes_nothing(store: SnapshotStore, make_contents: Make) -> None:
    assert store.publish(make_contents()) == store.publish(make_contents())
    assert len(store.history()) == 1


def test_history_tells_what_happened(store: SnapshotStore, make_contents: Make) -> None:
    a, b = store.publish(make_contents(seed=1)), store.publish(make_contents(seed=2))
    store.rollback()
    assert [(e.action, e.version, e.previous) for e in store.history()] == [
        ("publish", a, None),
        ("publish", b, a),
        ("rollback", a, b),
    ]
    assert store.versions() == (a, b)


def test_rollback_goes_back_one_publication_at_a_time(store: SnapshotStore, make_contents: Make) -> None:
    a, b, c = (store.publish(make_contents(seed=seed)) for seed in (1, 2, 3))
    assert [store.rollback(), store.rollback()] == [b, a]
    with pytest.raises(UnknownVersion, match=f"before {a}"):
        store.rollback()
    assert store.current_version() == a
    assert store.rollback(to=c) == c
    assert store.rollback() == b


def test_rollback_never_returns_to_what_was_rolled_back(store: SnapshotStore, make_contents: Make) -> None:
    store.publish(make_contents(seed=1))
    b = store.publish(make_contents(seed=2))
    store.publish(make_contents(seed=3))  # bad
    store.rollback()
    store.publish(make_contents(seed=4))  # bad as well
    assert store.rollback() == b


def test_rollback_to_a_damaged_version_keeps_the_current_one(store: SnapshotStore, make_contents: Make) -> None:
    a, b = store.publish(make_contents(seed=1)), store.publish(make_contents(seed=2))
    (store.root / "pools" / "versions" / a / "exemplars.jsonl").write_text("")
    with pytest.raises(SnapshotError):
        store.rollback()
    assert store.current_version() == b


@pytest.mark.parametrize("version", ["0" * 16, "..", "../../pools", "", "x" * 16, "CURRENT"])
def test_unknown_versions(store: SnapshotStore, make_contents: Make, version: str) -> None:
    known = store.publish(make_contents())
    with pytest.raises(UnknownVersion) as caught:
        store.rollback(to=version)
    assert caught.value.known == (known,)
    if version:
        with pytest.raises(UnknownVersion):
            store.load(None, version)
        with pytest.raises(UnknownVersion):
            store.verify(version)


def test_publish_a_folder_made_elsewhere(store: SnapshotStore, make_contents: Make, tmp_path: Path) -> None:
    folder = write_snapshot(make_contents(), tmp_path, "2001-01-01T00:00:00+00:00")
    assert store.publish(folder) == folder.name
    assert store.load(None).created_at == "2001-01-01T00:00:00+00:00"
    (folder / "vectors.safetensors").write_bytes(b"")
    with pytest.raises(SnapshotError, match="has 0 bytes"):
        store.publish(folder)


def test_a_snapshot_of_another_collection_is_refused(store: SnapshotStore, make_contents: Make, tmp_path: Path) -> None:
    with pytest.raises(InvalidName, match="'shop'"):
        store.publish(make_contents("shop"))
    store.publish(make_contents())
    shop = SnapshotStore(store.root, "shop")
    version = shop.publish(make_contents("shop"))
    pools = store.root / "pools"
    (store.root / "shop" / "versions" / version).rename(pools / "versions" / version)
    (pools / "CURRENT").write_text(version + "\n")
    with pytest.raises(SnapshotError, match="is a snapshot of 'shop', not of 'pools'"):
        store.load(None)
    assert any("is a snapshot of 'shop'" in problem for problem in store.verify())


def test_another_encoder_is_refused(store: SnapshotStore, make_contents: Make, fingerprint: str) -> None:
    store.publish(make_contents())
    with pytest.raises(FingerprintMismatch, match=fingerprint):
        store.load("cd" * 32)


@pytest.mark.parametrize("text", ["", "\n", "../../../etc", "0" * 15, "\xff" * 16, "0" * 16 + "\n\n"])
def test_a_damaged_current_is_one_typed_error(store: SnapshotStore, make_contents: Make, text: str) -> None:
    store.publish(make_contents())
    (store.root / "pools" / "CURRENT").write_text(text)
    with pytest.raises(SnapshotError, match="names no version"):
        store.load(None)
    assert len(store.verify()) == 1


def test_verify_lists_every_problem(store: SnapshotStore, make_contents: Make) -> None:
    a, b, c = (store.publish(make_contents(seed=seed)) for seed in (1, 2, 3))
    versions = store.root / "pools" / "versions"
    (versions / a / "manifest.json").unlink()
    (versions / b / "vectors.safetensors").write_bytes(b"x")
    assert [str(versions / version) in p for version, p in zip((a, b), store.verify(), strict=True)] == [True, True]
    assert store.verify(c) == ()
    assert len(store.verify(a)) == 1
    (store.root / "pools" / "history.jsonl").write_text("{}\n")
    (store.root / "pools" / "CURRENT").write_text("0" * 16 + "\n")
    assert len(store.verify()) == 4


@pytest.mark.parametrize("text", ["{}\n", "{\n", '{"time": 1}\n', "\n", "\xff\n"])
def test_a_damaged_history_stops_publication(store: SnapshotStore, make_contents: Make, text: str) -> None:
    a = store.publish(make_contents(seed=1))
    (store.root / "pools" / "history.jsonl").write_text(text)
    with pytest.raises(SnapshotError, match="line 1 is damaged"):
        store.publish(make_contents(seed=2))
    assert store.load(None).version == a


def test_history_is_json_lines(store: SnapshotStore, make_contents: Make) -> None:
    version = store.publish(make_contents())
    (line,) = (store.root / "pools" / "history.jsonl").read_text().splitlines()
    assert json.loads(line)["version"] == version


def test_what_else_lies_in_the_root_is_left_alone(store: SnapshotStore, make_contents: Make) -> None:
    store.publish(make_contents())
    SnapshotStore(store.root, "shop").publish(make_contents("shop"))
    for name in (".builds", "Other", "safe"):
        (store.root / name).mkdir()
        (store.root / name / "CURRENT").write_text("x")
    (store.root / "unpublished").mkdir()
    (store.root / "file").write_text("")
    assert collections(store.root) == {"pools": "pools", "shop": "gallery"}
    with pytest.raises(SnapshotError, match="cannot be listed"):
        collections(store.root / "absent")


def test_readers_see_whole_versions_while_others_publish(store: SnapshotStore, make_contents: Make) -> None:
    two = [make_contents(seed=1), make_contents(seed=2)]
    expected = {Snapshot.of(contents).version for contents in two}
    store.publish(two[0])
    problems: list[BaseException] = []

    def publish(offset: int) -> None:
        try:
            for i in range(6):
                store.publish(two[(i + offset) % 2])
        except BaseException as error:
            problems.append(error)
            raise

    threads = [threading.Thread(target=publish, args=(offset,)) for offset in (0, 1)]
    for thread in threads:
        thread.start()
    seen = set()
    while any(thread.is_alive() for thread in threads):
        seen.add(store.load(None).version)
    for thread in threads:
        thread.join()
    assert problems == []
    assert seen <= expected
    entries = store.history()
    assert all(after.previous == before.version for before, after in pairwise(entries))
    assert store.verify() == ()
