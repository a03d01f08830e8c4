"""What is served: absent and empty folders, new versions, damaged ones, those of another encoder."""

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from indexer.catalog.database import Database
from indexer.catalog.edits import Rebase
from indexer.catalog.ledger import Catalog
from indexer.catalog.state import Stamp, State
from indexer.contents import Contents
from indexer.durable import replace_file
from indexer.errors import SnapshotError, UnknownCollection
from indexer.live.collection import LiveCollection
from indexer.live.view import View
from indexer.store import SnapshotStore
from perception.errors import FingerprintMismatch
from perception.testing import ToyEncoder, synthetic_image
from service.errors import NotReady
from service.published import Adopt, Published
from service.testing import publish, toy_pools

Opened = Callable[[Path], tuple[Published, Adopt | None]]
ENCODER = ToyEncoder()
STAMP = Stamp(ENCODER.name, ENCODER.fingerprint, ENCODER.dim)


@pytest.fixture(params=["catalogue", "off"])
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    """Opens a folder, with a catalogue and without; gives what is published, and what adopts news."""
    file = tmp_path_factory.mktemp("catalogue") / "catalog.sqlite3"
    with closing(Database.open(f"sqlite:///{file}")) as database:

        def open_folder(root: Path) -> tuple[Published, Adopt | None]:
            published = Published(root, STAMP)
            catalog = Catalog(database, root, published.base) if request.param == "catalogue" else None
            published.open(catalog)

            async def adopt(publications: Sequence[Rebase]) -> None:
                assert catalog is not None
                catalog.adopt(publications)
                published.show()

            return published, None if catalog is None else adopt

        yield open_folder


def test_an_absent_folder_is_no_pools_until_something_is_published(tmp_path: Path, opened: Opened) -> None:
    root = tmp_path / "later"
    published, adopt = opened(root)
    assert not published.snapshots
    with pytest.raises(NotReady, match="hardlook-index build"):
        published.pools()
    with pytest.raises(UnknownCollection):
        published.get("pools")
    assert not asyncio.run(published.pick_up(adopt))
    version = publish(root, ENCODER, toy_pools())
    assert asyncio.run(published.pick_up(adopt))
    assert published.pools().version == version


def test_an_empty_folder_and_empty_pools_are_not_ready(tmp_path: Path, opened: Opened) -> None:
    published, adopt = opened(tmp_path)
    with pytest.raises(NotReady, match="no pools are published"):
        published.pools()
    empty = Contents("pools", ENCODER.name, ENCODER.fingerprint, (), ENCODER.weight.detach().numpy()[:0, :16].copy())
    SnapshotStore(tmp_path, "pools").publish(empty)
    assert asyncio.run(published.pick_up(adopt))
    with pytest.raises(NotReady, match="empty"):
        published.pools()


def test_a_new_version_is_picked_up_and_the_old_one_lives_on_for_who_holds_it(tmp_path: Path, opened: Opened) -> None:
    first = publish(tmp_path, ENCODER, toy_pools(2))
    published, adopt = opened(tmp_path)
    held = published.pools()
    second = publish(tmp_path, ENCODER, toy_pools(3))
    assert asyncio.run(published.pick_up(adopt))
    assert not asyncio.run(published.pick_up(adopt))
    assert (held.version, published.pools().version) == (first, second)
    assert len(held) == 6


def test_galleries_have_their_names(tmp_path: Path, opened: Opened) -> None:
    publish(tmp_path, ENCODER, {"a": [synthetic_image(1)]}, collection="places")
    published, _ = opened(tmp_path)
    assert published.get("places").kind == "gallery"
    with pytest.raises(NotReady):
        published.pools()


def test_another_encoder_s_snapshot_is_refused_with_both_fingerprints(tmp_path: Path, opened: Opened) -> None:
    other = ToyEncoder(seed=1)
    publish(tmp_path, other, toy_pools())
    with pytest.raises(FingerprintMismatch) as caught:
        opened(tmp_path)
    assert other.fingerprint in str(caught.value)
    assert ENCODER.fingerprint in str(caught.value)


def damage(root: Path) -> None:
    [vectors] = root.glob("pools/versions/*/vectors.safetensors")
    data = bytearray(vectors.read_bytes())
    data[-1] ^= 1
    vectors.write_bytes(data)


def test_a_damaged_snapshot_is_refused_at_the_start(tmp_path: Path, opened: Opened) -> None:
    publish(tmp_path, ENCODER, toy_pools())
    damage(tmp_path)
    with pytest.raises(SnapshotError, match="damaged"):
        opened(tmp_path)


def test_what_cannot_be_loaded_leaves_the_old_state_and_is_logged_once(
    tmp_path: Path, opened: Opened, caplog: pytest.LogCaptureFixture
) -> None:
    version = publish(tmp_path, ENCODER, toy_pools())
    published, adopt = opened(tmp_path)
    publish(tmp_path, ToyEncoder(seed=1), toy_pools())
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            assert not asyncio.run(published.pick_up(adopt))
    assert published.pools().version == version
    assert len(caplog.records) == 1
    SnapshotStore(tmp_path, "pools").rollback()
    asyncio.run(published.pick_up(adopt))
    assert published.pools().version == version


def test_watching_outlives_failures(tmp_path: Path, opened: Opened) -> None:
    published, adopt = opened(tmp_path)

    async def work() -> None:
        watcher = asyncio.create_task(published.watch(0.01, adopt))
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


def test_a_publication_counts_from_when_it_is_current_not_from_its_line(
    tmp_path: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line of history is written first: a look between the two must not take the old version for the new one."""
    publish(tmp_path, ENCODER, toy_pools(2))
    published, adopt = opened(tmp_path)
    looked: list[bool] = []

    def replace_and_look(path: Path, data: bytes) -> None:
        if path.name == "CURRENT":
            looked.append(asyncio.run(published.pick_up(adopt)))
        replace_file(path, data)

    monkeypatch.setattr("indexer.store.replace_file", replace_and_look)
    version = publish(tmp_path, ENCODER, toy_pools(3))
    assert looked == [False]
    assert asyncio.run(published.pick_up(adopt))
    assert published.pools().version == version


def test_a_collection_that_cannot_be_shown_holds_up_no_other(
    tmp_path: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path, ENCODER, toy_pools(2))
    publish(tmp_path, ENCODER, {"a": [synthetic_image(1)]}, collection="landmarks")
    published, adopt = opened(tmp_path)
    held = published.get("landmarks")
    show = LiveCollection.show

    def damaged(self: LiveCollection, state: State, *rest: Any, **more: Any) -> View:
        if state.collection == "landmarks":
            raise SnapshotError(tmp_path, "is damaged")
        return show(self, state, *rest, **more)

    monkeypatch.setattr(LiveCollection, "show", damaged)
    publish(tmp_path, ENCODER, {"a": [synthetic_image(2)]}, collection="landmarks")
    version = publish(tmp_path, ENCODER, toy_pools(3))
    assert not asyncio.run(published.pick_up(adopt))
    assert published.pools().version == version
    assert published.get("landmarks") is held
    assert published.shows(published.pools().state)
    assert not published.shows(State("elsewhere"))
