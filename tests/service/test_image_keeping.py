"""The keeper of pictures when things go wrong: full queues, slow decoders, hung disks, an end in the middle."""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from indexer.catalog.review_images import Standing
from indexer.errors import CatalogError, UnknownExemplar
from perception.errors import CorruptImage
from perception.verdict import VerdictLabel
from service import image_keeping
from service.decoding import FrameOrigin, Preview
from service.errors import DecoderCrashed, NotReady
from service.image_keeping import ImageKeeper, live_of
from service.kept_images import KeptImages

Change = Callable[["Stage"], None]
OPEN = Standing(True, "pools", None)


class Decoder:
    """Makes the same picture of everything, when it may."""

    def __init__(self) -> None:
        self.may = asyncio.Event()
        self.may.set()
        self.asked: list[tuple[bytes, int]] = []
        self.error: Exception | None = None

    async def __aenter__(self) -> "Decoder":
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def preview(self, data: bytes, frame: int = 0) -> Preview:
        self.asked.append((data, frame))
        await self.may.wait()
        if self.error is not None:
            raise self.error
        return Preview(b"picture of " + data, 1, 1)


class View:
    """A collection of exemplars by id, with the hashes of their files."""

    def __init__(self, exemplars: dict[str, str]) -> None:
        self.exemplars, self.base = exemplars, None

    @property
    def state(self) -> Any:
        of = {id: SimpleNamespace(exemplar=self.exemplar(id)) for id in self.exemplars}
        return SimpleNamespace(records=of)

    def exemplar(self, id: str) -> Any:
        if id not in self.exemplars:
            raise UnknownExemplar(id, "the view")
        return SimpleNamespace(id=id, sha256=self.exemplars[id])


@dataclass
class Stage:
    """What a keeper sees of the service."""

    folder: Path
    standing: Standing | None = OPEN
    error: Exception | None = None
    exemplars: dict[str, str] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)

    async def read(self, function: Callable[..., Any]) -> Standing | None:
        if self.error is not None:
            raise self.error
        return self.standing

    def keeper(self, decoder: Decoder, **changes: Any) -> ImageKeeper:
        self.images = KeptImages(self.folder, kept_s=1000, max_bytes=10_000)
        published: Any = SimpleNamespace(snapshots={"pools": View(self.exemplars)})
        editor: Any = SimpleNamespace(read=self.read)
        double: Any = decoder
        count = lambda outcome, n: self.counts.update({outcome: n})  # noqa: E731
        return ImageKeeper(self.images, double, editor, published, **{"every": False, "counted": count, **changes})

    @property
    def kept(self) -> dict[str, str]:
        return {path.stem: path.parent.parent.name for path in self.folder.rglob("*.jpg")}


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path / "images")


def sha(number: int) -> str:
    return f"{number:064x}"


def seen(number: int, label: VerdictLabel = VerdictLabel.REVIEW, size_bytes: int = 10, frames: int = 1) -> Any:
    """What the classifier found of an image."""
    return SimpleNamespace(
        sha256=bytes.fromhex(sha(number)),
        file=b"%d " % number + bytes(size_bytes),
        frame=FrameOrigin(frames - 1, None),
        image=SimpleNamespace(frames_in_file=frames),
        verdict=SimpleNamespace(label=label),
    )


def recorded(*numbers: int) -> Sequence[Any]:
    return [SimpleNamespace(sha256=sha(number)) for number in numbers]


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def coroutine() -> None:
        await work()

    asyncio.run(asyncio.wait_for(coroutine(), 60))


async def until(condition: Callable[[], object]) -> None:
    until_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until_s
        await asyncio.sleep(0.005)


def test_a_verdict_waits_until_it_is_in_the_catalogue(stage: Stage) -> None:
    async def work() -> None:
        async with stage.keeper(decoder := Decoder()) as keeper:
            keeper.judged(seen(1))
            keeper.judged(seen(1))  # once is enough
            keeper.judged(seen(2))
            keeper.judged(seen(3, VerdictLabel.UNSAFE))
            await asyncio.sleep(0.05)
            assert (keeper.depth, decoder.asked) == (2, [])
            await keeper.recorded(recorded(1, 3, 4))
            await until(lambda: stage.counts["kept"] == 1)
            assert stage.kept == {sha(1): "recent"}
            assert await keeper.read(sha(1)) == b"picture of " + seen(1).file
            assert await keeper.kept([sha(1), sha(2)]) == {sha(1)}
        assert stage.counts == {"kept": 1, "dropped": 1}  # the other was never recorded

    run(work)


def test_no_verdict_is_kept_where_verdicts_open_no_reviews(stage: Stage) -> None:
    async def work() -> None:
        async with stage.keeper(Decoder(), queued=False) as keeper:
            keeper.judged(seen(1))
            assert keeper.depth == 0
        async with stage.keeper(Decoder(), queued=False, every=True) as keeper:
            keeper.judged(seen(1))
            await until(lambda: stage.kept)

    run(work)


@pytest.mark.parametrize("bound", [{"max_waiting": 3}, {"max_waiting_bytes": 3 * 12 + 11}])
def test_what_waits_is_bounded(stage: Stage, bound: dict[str, int]) -> None:
    async def work() -> None:
        async with stage.keeper(decoder := Decoder(), every=True, **bound) as keeper:
            decoder.may.clear()
            for number in range(8):
                keeper.judged(seen(number, VerdictLabel.SAFE))
            assert (keeper.depth, stage.counts["dropped"]) == (3, 5)
            decoder.may.set()
            await until(lambda: stage.counts["kept"] == 3)
            assert keeper.depth == 0
            keeper.judged(seen(8, VerdictLabel.SAFE))  # there is room again
            await until(lambda: stage.counts["kept"] == 4)

    run(work)


def test_failures_are_of_one_image_and_are_logged_once(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        async with stage.keeper(decoder := Decoder(), every=True) as keeper:
            for error in (CorruptImage("x"), DecoderCrashed(-11), RuntimeError("a bug")):
                decoder.error = error
                for number in range(3):
                    keeper.judged(seen(number, VerdictLabel.SAFE))
                await until(lambda: not keeper.depth)
            decoder.error = None
            stage.error = CatalogError("the catalogue", "gone")
            keeper.judged(seen(4))
            await keeper.recorded(recorded(4))
            await until(lambda: not keeper.depth)
            stage.error = None
            keeper.judged(seen(5))
            await keeper.recorded(recorded(5))
            await until(lambda: not keeper.depth)
        assert stage.counts == {"failed": 10, "kept": 1}

    run(work)
    assert len(caplog.records) == 4
    assert [record.exc_info is not None for record in caplog.records] == [False, False, True, False]


def test_a_still_is_made_once_and_an_animation_anew(stage: Stage) -> None:
    async def work() -> None:
        async with stage.keeper(decoder := Decoder(), every=True) as keeper:
            for _ in range(2):
                keeper.judged(seen(1, VerdictLabel.SAFE))
                keeper.judged(seen(2, VerdictLabel.SAFE, frames=5))
            await until(lambda: not keeper.depth)
            assert [frame for _, frame in decoder.asked] == [0, 4, 4]
            assert stage.counts == {"kept": 3, "present": 1}

    run(work)


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda stage: None, "recent"),
        (lambda stage: setattr(stage, "standing", None), None),  # the queue was full
        (lambda stage: setattr(stage, "standing", Standing(False, "pools", None)), None),  # dismissed
        (lambda stage: setattr(stage, "standing", Standing(False, "pools", "new")), "exemplars"),
        (lambda stage: setattr(stage, "standing", Standing(False, "pools", "gone")), None),
    ],
)
def test_what_happens_while_a_picture_is_made_counts(stage: Stage, change: Change, place: str | None) -> None:
    async def work() -> None:
        stage.exemplars["new"] = sha(1)
        async with stage.keeper(decoder := Decoder()) as keeper:
            decoder.may.clear()
            keeper.judged(seen(1))
            await keeper.recorded(recorded(1))
            await until(lambda: decoder.asked)
            change(stage)
            decoder.may.set()
            await until(lambda: not keeper.depth)
        assert stage.kept == ({} if place is None else {sha(1): place})

    run(work)


def test_an_exemplar_that_is_gone_again_gets_no_picture(stage: Stage) -> None:
    async def work() -> None:
        stage.exemplars["a"] = sha(1)
        async with stage.keeper(decoder := Decoder()) as keeper:
            decoder.may.clear()
            keeper.added("pools", "a", sha(1), b"data", FrameOrigin(0, None), still=True)
            await until(lambda: decoder.asked)
            del stage.exemplars["a"]
            await keeper.removed(sha(1))
            decoder.may.set()
            await until(lambda: not keeper.depth)
        assert (stage.kept, stage.counts) == ({}, {"unwanted": 1})

    run(work)


def test_what_a_rollback_left_behind_goes_as_all_others_do(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_keeping, "_SETTLED_S", -1.0)
    stage.exemplars |= {"a": sha(1)}
    before = KeptImages(stage.folder, kept_s=1000, max_bytes=10_000)
    for number in (1, 2):
        before.keep(sha(number), b"x", exemplar=True)

    async def work() -> None:
        async with stage.keeper(Decoder()):
            await until(lambda: stage.kept == {sha(1): "exemplars", sha(2): "recent"})

    run(work)


def test_old_pictures_go_by_themselves(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        async with stage.keeper(Decoder(), every=True, prune_s=0.01) as keeper:
            keeper.judged(seen(1, VerdictLabel.SAFE))
            await until(lambda: stage.kept)
            later_s = time.time() + 1001
            monkeypatch.setattr(stage.images, "clock", lambda: later_s)
            await until(lambda: stage.counts["expired"] == 1)
            assert stage.kept == {}

    run(work)


def test_a_hung_disk_holds_nobody_up(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_keeping, "_WAIT_S", 0.1)
    hung = threading.Event()

    def hang(*_: Any, **__: Any) -> None:
        hung.wait(50)

    async def work() -> None:
        async with stage.keeper(Decoder(), every=True, last_s=0.1) as keeper:
            for call in ("keep", "forget", "promote", "read", "kept"):
                monkeypatch.setattr(stage.images, call, hang)
            keeper.judged(seen(1, VerdictLabel.SAFE))
            await keeper.decided("pools", None, sha(1))
            await keeper.removed(sha(1))
            assert await keeper.kept([sha(1)]) == frozenset()
            with pytest.raises(NotReady, match="folder of kept images"):
                await keeper.read(sha(1))
            keeper.judged(seen(2, VerdictLabel.SAFE))
            assert await asyncio.to_thread(lambda: 1) == 1  # other threads are not taken
        assert stage.counts["dropped"] == 2  # at the end
        hung.set()

    run(work)


def test_who_hangs_up_does_not_stop_a_removal(stage: Stage) -> None:
    async def work() -> None:
        async with stage.keeper(Decoder()) as keeper:
            stage.images.keep(sha(1), b"x", exemplar=True)
            task = asyncio.create_task(keeper.removed(sha(1)))
            await asyncio.sleep(0)
            task.cancel()
            await until(lambda: stage.kept == {})

    run(work)


def test_which_files_have_exemplars() -> None:
    def exemplar(id: str, sha256: str) -> Any:
        return SimpleNamespace(id=id, sha256=sha256)

    changed = {
        "a": None,
        "b": SimpleNamespace(exemplar=exemplar("b", "B2")),
        "c": SimpleNamespace(exemplar=exemplar("c", "C")),
    }
    base = SimpleNamespace(exemplars=[exemplar("a", "A"), exemplar("b", "B1"), exemplar("d", "D"), exemplar("e", "")])
    view: Any = SimpleNamespace(state=SimpleNamespace(records=changed), base=base)
    bare: Any = SimpleNamespace(state=SimpleNamespace(records={}), base=None)
    assert live_of([bare, view], {"A", "B1", "B2", "C", "D", "X"}) == {"B2", "C", "D"}
