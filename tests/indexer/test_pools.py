import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from indexer.contents import Contents
from indexer.errors import SnapshotError, UnknownCollection
from indexer.pools import Collections
from indexer.store import SnapshotStore
from perception.errors import FingerprintMismatch

Make = Callable[..., Contents]
Publish = Callable[..., str]


@pytest.fixture
def publish(tmp_path: Path, make_contents: Make) -> Publish:
    def publish(collection: str = "pools", **options: object) -> str:
        return SnapshotStore(tmp_path, collection).publish(make_contents(collection, **options))

    return publish


def test_open_loads_everything(tmp_path: Path, publish: Publish, fingerprint: str) -> None:
    pools, shop, zoo = publish(), publish("shop"), publish("zoo", n=4)
    found = Collections.open(tmp_path, fingerprint)
    assert found.pools.version == found.get("pools").version == pools
    assert {name: s.version for name, s in found.galleries.items()} == {"shop": shop, "zoo": zoo}
    assert found.get("zoo").kind == "gallery"
    for name in ("safe", "nobody", "../pools"):
        with pytest.raises(UnknownCollection) as caught:
            found.get(name)
        assert caught.value.known == ("pools", "shop", "zoo")


def test_pools_are_required_unless_said_otherwise(tmp_path: Path, publish: Publish, fingerprint: str) -> None:
    with pytest.raises(UnknownCollection):
        Collections.open(tmp_path, fingerprint)
    publish("shop")
    with pytest.raises(UnknownCollection, match="unknown collection 'pools'; published: shop"):
        Collections.open(tmp_path, fingerprint)
    found = Collections.open(tmp_path, fingerprint, required=False)
    assert set(found.galleries) == {"shop"}
    with pytest.raises(UnknownCollection):
        _ = found.pools
    assert not found.reload()
    publish()
    assert found.reload()
    assert found.pools.kind == "pools"


def test_one_snapshot_of_another_encoder_stops_the_start(tmp_path: Path, publish: Publish, fingerprint: str) -> None:
    publish()
    publish("shop", fingerprint="cd" * 32)
    with pytest.raises(FingerprintMismatch) as caught:
        Collections.open(tmp_path, fingerprint)
    assert "snapshot shop/" in str(caught.value)
    assert fingerprint in str(caught.value)
    assert "cd" * 32 in str(caught.value)


def test_a_missing_root_is_a_typed_error(tmp_path: Path, fingerprint: str) -> None:
    with pytest.raises(SnapshotError, match="cannot be listed"):
        Collections.open(tmp_path / "absent", fingerprint)


def test_reload_swaps_only_what_changed(tmp_path: Path, publish: Publish, fingerprint: str) -> None:
    publish()
    publish("shop")
    found = Collections.open(tmp_path, fingerprint)
    before = found.current
    assert not found.reload()
    assert found.current is before
    version = publish(seed=1)
    assert found.pools.version != version
    assert found.reload()
    assert found.pools.version == version
    assert before.pools.version != version  # a request that began before goes on undisturbed
    assert found.get("shop") is before.get("shop")
    SnapshotStore(tmp_path, "pools").rollback()
    assert found.reload()
    assert found.pools.version == before.pools.version
    publish("zoo")
    assert found.reload()
    assert set(found.galleries) == {"shop", "zoo"}


def test_a_failed_reload_keeps_the_old_state(tmp_path: Path, publish: Publish, fingerprint: str) -> None:
    publish()
    found = Collections.open(tmp_path, fingerprint)
    before = found.current
    publish(fingerprint="cd" * 32)
    with pytest.raises(FingerprintMismatch):
        found.reload()
    assert found.current is before
    version = publish(seed=5)
    (tmp_path / "pools" / "versions" / version / "exemplars.jsonl").unlink()
    with pytest.raises(SnapshotError):
        found.reload()
    assert found.current is before
    (tmp_path / "pools" / "CURRENT").unlink()
    with pytest.raises(UnknownCollection):
        found.reload()
    assert found.current is before


def test_readers_never_see_two_versions(
    tmp_path: Path, publish: Publish, fingerprint: str, unit: Callable[..., NDArray[np.float32]]
) -> None:
    publish()
    found = Collections.open(tmp_path, fingerprint)
    queries, stop, problems = unit(9, 2), threading.Event(), []

    def read() -> None:
        expected: dict[str, object] = {}
        while not stop.is_set():
            snapshot = found.pools
            answer = snapshot.search_each(queries, 3)
            if expected.setdefault(snapshot.version, answer) != answer:
                problems.append(snapshot.version)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for seed in range(8):
        publish(seed=seed % 3)
        found.reload()
    stop.set()
    for reader in readers:
        reader.join()
    assert problems == []
