"""What is served: absent and empty folders, new versions, damaged ones, those of another encoder."""

import asyncio
import logging
from pathlib import Path

import pytest

from indexer.contents import Contents
from indexer.errors import SnapshotError, UnknownCollection
from indexer.store import SnapshotStore
from perception.errors import FingerprintMismatch
from perception.testing import ToyEncoder, synthetic_image
from service.errors import NotReady
from service.published import Published
from service.testing import publish, toy_pools

ENCODER = ToyEncoder()


def test_an_absent_folder_is_no_pools_until_something_is_published(tmp_path: Path) -> None:
    root = tmp_path / "later"
    published = Published(root, ENCODER.fingerprint)
    assert not published.snapshots
    with pytest.raises(NotReady, match="hardlook-index build"):
        published.pools()
    with pytest.raises(UnknownCollection):
        published.get("pools")
    assert not published.reload()
    version = publish(root, ENCODER, toy_pools())
    assert published.reload()
    assert published.pools().version == version


def test_an_empty_folder_and_empty_pools_are_not_ready(tmp_path: Path) -> None:
    published = Published(tmp_path, ENCODER.fingerprint)
    with pytest.raises(NotReady, match="no pools are published"):
        published.pools()
    empty = Contents("pools", ENCODER.name, ENCODER.fingerprint, (), ENCODER.weight.detach().numpy()[:0, :16].copy())
    SnapshotStore(tmp_path, "pools").publish(empty)
    assert published.reload()
    with pytest.raises(NotReady, match="empty"):
        published.pools()


def test_a_new_version_is_picked_up_and_the_old_one_lives_on_for_who_holds_it(tmp_path: Path) -> None:
    first = publish(tmp_path, ENCODER, toy_pools(2))
    published = Published(tmp_path, ENCODER.fingerprint)
    held = published.pools()
    second = publish(tmp_path, ENCODER, toy_pools(3))
    assert published.reload()
    assert not published.reload()
    assert (held.version, published.pools().version) == (first, second)
    assert len(held) == 6


def test_galleries_have_their_names(tmp_path: Path) -> None:
    publish(tmp_path, ENCODER, {"a": [synthetic_image(1)]}, collection="places")
    published = Published(tmp_path, ENCODER.fingerprint)
    assert published.get("places").kind == "gallery"
    with pytest.raises(NotReady):
        published.pools()


def test_another_encoder_s_snapshot_is_refused_with_both_fingerprints(tmp_path: Path) -> None:
    other = ToyEncoder(seed=1)
    publish(tmp_path, other, toy_pools())
    with pytest.raises(FingerprintMismatch) as caught:
        Published(tmp_path, ENCODER.fingerprint)
    assert other.fingerprint in str(caught.value)
    assert ENCODER.fingerprint in str(caught.value)


def damage(root: Path) -> None:
    [vectors] = root.glob("pools/versions/*/vectors.safetensors")
    data = bytearray(vectors.read_bytes())
    data[-1] ^= 1
    vectors.write_bytes(data)


def test_a_damaged_snapshot_is_refused_at_the_start(tmp_path: Path) -> None:
    publish(tmp_path, ENCODER, toy_pools())
    damage(tmp_path)
    with pytest.raises(SnapshotError, match="damaged"):
        Published(tmp_path, ENCODER.fingerprint)


def test_what_cannot_be_loaded_leaves_the_old_state_and_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    version = publish(tmp_path, ENCODER, toy_pools())
    published = Published(tmp_path, ENCODER.fingerprint)
    publish(tmp_path, ToyEncoder(seed=1), toy_pools())
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            assert not published.reload()
    assert published.pools().version == version
    assert len(caplog.records) == 1
    SnapshotStore(tmp_path, "pools").rollback()
    assert not published.reload()
    assert published.pools().version == version


def test_watching_outlives_failures(tmp_path: Path) -> None:
    published = Published(tmp_path, ENCODER.fingerprint)

    async def work() -> None:
        watcher = asyncio.create_task(published.watch(0.01))
        publish(tmp_path, ToyEncoder(seed=1), toy_pools())
        await asyncio.sleep(0.1)
        version = publish(tmp_path, ENCODER, toy_pools())
        for _ in range(2000):
            if "pools" in published.snapshots:
                break
            await asyncio.sleep(0.01)
        assert published.pools().version == version
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)

    asyncio.run(work())
