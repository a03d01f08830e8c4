import csv
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from indexer.build import BATCHES_PER_PART, BuildReport, build
from indexer.errors import BuildError, InvalidLabel, InvalidName
from indexer.snapshot import Snapshot
from indexer.sources import FolderSource, ManifestSource, Skipped, SourceItem
from indexer.workdir import WorkDir
from perception.encoder import encode_images
from perception.errors import NonFiniteEmbedding
from perception.image import ImageLimits
from perception.testing import ToyEncoder, encoded, synthetic_image

WriteImages = Callable[..., Path]


def build_pools(folder: Path, work_dir: Path, **options: object) -> BuildReport:
    defaults = {"encoder": ToyEncoder(), "collection": "pools", "batch_size": 2}
    return build(source=FolderSource(folder, "pools"), work_dir=work_dir, **{**defaults, **options})  # type: ignore[arg-type]


def report_of(report: BuildReport) -> dict[str, tuple[str, str]]:
    with report.report_path.open(newline="", encoding="utf-8") as file:
        return {row["id"]: (row["error"], row["message"]) for row in csv.DictReader(file)}


def version_of(report: BuildReport) -> str:
    return Snapshot.of(report.contents).version


class KilledError(BaseException):
    """Stands for SIGKILL: nothing in the product may catch it."""


def test_embeddings_are_those_of_the_encoder(write_images: WriteImages, tmp_path: Path) -> None:
    folder, encoder = write_images(11), ToyEncoder()
    report = build_pools(folder, tmp_path / "work")
    contents = report.contents
    assert (report.n_entries, report.skipped, report_of(report)) == (22, {}, {})
    assert (contents.encoder_name, contents.encoder_fingerprint) == (encoder.name, encoder.fingerprint)
    assert contents.counts == {"buffer": 0, "safe": 11, "unsafe": 11}
    expected = encode_images(encoder, [folder / e.id for e in contents.exemplars]).numpy()
    np.testing.assert_allclose(contents.embeddings, expected, atol=1e-6)
    for exemplar in contents.exemplars:
        assert exemplar.sha256 == hashlib.sha256((folder / exemplar.id).read_bytes()).hexdigest()
        assert exemplar.source == exemplar.id


def test_hostile_files_are_reported_and_skipped(write_images: WriteImages, tmp_path: Path) -> None:
    folder = write_images(3)
    good = encoded(synthetic_image(77))
    hostile = {
        "empty.png": b"",
        "text.png": b"not an image",
        "cut.png": good[: len(good) // 2],
        "header.jpg": b"\xff\xd8\xff" + os.urandom(200),
        "code.pkl": b"cos\nsystem\n(S'false'\ntR.",
        "large.png": encoded(synthetic_image(1, (300, 300))),
    }
    for name, data in hostile.items():
        (folder / "safe" / name).write_bytes(data)
    with (folder / "safe" / "huge.png").open("wb") as file:
        file.truncate(1 << 40)
    (folder / "unsafe" / "passwd").symlink_to("/etc/passwd")
    report = build_pools(folder, tmp_path / "work", limits=ImageLimits(max_pixels=80_000))
    listed = report_of(report)
    assert set(listed) == {f"safe/{name}" for name in hostile} | {"safe/huge.png", "unsafe/passwd"}
    assert listed["safe/huge.png"][0] == listed["safe/large.png"][0] == "ImageTooLarge"
    assert listed["safe/text.png"][0] == "UnsupportedFormat"
    assert listed["unsafe/passwd"] == ("OSError", "symbolic link out of the folder")
    assert report.contents.counts == {"buffer": 0, "safe": 3, "unsafe": 3}
    assert sum(report.skipped.values()) == 8
    assert report.n_entries == 14


class Items:
    """A source of given entries."""

    identity = "items"

    def __init__(self, *entries: SourceItem | Skipped) -> None:
        self.entries = entries

    def count(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[SourceItem | Skipped]:
        return iter(self.entries)


def item(id: str, seed: int = 0, label: str = "safe", error: BaseException | None = None) -> SourceItem:
    def read() -> bytes:
        if error is not None:
            raise error
        return encoded(synthetic_image(seed, (20, 20)))

    return SourceItem(id, label, id, {}, "", read)


@pytest.mark.parametrize("error", [ValueError("x"), RecursionError(), AssertionError(), OSError(5, "I/O error")])
def test_whatever_one_file_raises_does_not_end_the_run(error: Exception, tmp_path: Path) -> None:
    source = Items(item("a", 1), item("b", error=error), item("c", 2))
    report = build(ToyEncoder(), source, collection="pools", work_dir=tmp_path / "work")
    assert [e.id for e in report.contents.exemplars] == ["a", "c"]
    assert report_of(report) == {"b": (type(error).__name__, str(error))}


@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt()])
def test_want_of_memory_and_interrupts_end_it(error: BaseException, tmp_path: Path) -> None:
    source = Items(item("a", 1), item("b", error=error), item("c", 2))
    with pytest.raises(type(error)):
        build(ToyEncoder(), source, collection="pools", work_dir=tmp_path / "work")


def test_duplicates_are_dropped(tmp_path: Path) -> None:
    source = Items(
        item("a", 1), item("b", 1), item("c", 1, "unsafe"), item("a", 2), item("d", 2), Skipped("e", "e", "X", "y")
    )
    report = build(ToyEncoder(), source, collection="pools", work_dir=tmp_path / "work")
    assert [(e.id, e.label) for e in report.contents.exemplars] == [("a", "safe"), ("d", "safe"), ("c", "unsafe")]
    with report.report_path.open(newline="") as file:
        assert [tuple(row) for row in csv.reader(file)][1:] == [
            ("b", "b", "DuplicateImage", "same bytes and label as 'a'"),
            ("a", "a", "DuplicateId", "id 'a' occurs more than once"),
            ("e", "e", "X", "y"),
        ]


class PickyEncoder(ToyEncoder):
    """Has no finite embedding for dark images."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def encode(self, pixels: Tensor) -> Tensor:
        self.batches.append(len(pixels))
        bad = torch.nonzero(pixels.mean((1, 2, 3)) < 0.1).flatten()
        if len(bad):
            raise NonFiniteEmbedding(tuple(int(row) for row in bad))
        return super().encode(pixels)


def dark(id: str, level: int = 0) -> SourceItem:
    image = synthetic_image(0, (20, 20)).point(lambda value: level)
    return SourceItem(id, "safe", id, {}, "", lambda: encoded(image))


def test_an_image_without_a_finite_embedding_is_skipped_alone(tmp_path: Path) -> None:
    source = Items(item("a", 1), dark("b"), item("c", 2), dark("d", 1))
    report = build(PickyEncoder(), source, collection="pools", work_dir=tmp_path / "work", batch_size=4)
    assert [e.id for e in report.contents.exemplars] == ["a", "c"]
    assert {id: error for id, (error, _) in report_of(report).items()} == {
        "b": "NonFiniteEmbedding",
        "d": "NonFiniteEmbedding",
    }


def test_batches_are_full(write_images: WriteImages, tmp_path: Path) -> None:
    folder, encoder = write_images(20), PickyEncoder()
    (folder / "safe" / "004.png").write_bytes(b"")
    build_pools(folder, tmp_path / "work", encoder=encoder, batch_size=4)
    assert encoder.batches == [4] * 7 + [3] + [4] * 2  # 32 entries a part, one of them unreadable; then 8


def test_progress_counts_entries(write_images: WriteImages, tmp_path: Path) -> None:
    folder = write_images(3)
    (folder / "safe" / "0.png").write_bytes(b"")
    seen: list[tuple[int, int]] = []
    build_pools(folder, tmp_path / "work", progress=lambda done, skipped: seen.append((done, skipped)))
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == ((0, 0), (7, 1))


PARTS = 3
ENTRIES = 2 * BATCHES_PER_PART * PARTS - 5


@pytest.fixture
def many(write_images: WriteImages) -> Path:
    """Images for a little less than three parts at batch size 2, some of them unreadable or repeated."""
    folder = write_images(ENTRIES, labels=("safe",))
    for name in ("003", "017", "018"):
        (folder / "safe" / f"{name}.png").write_bytes(b"broken")
    for name in ("009", "020", "040"):
        shutil.copy(folder / "safe" / "002.png", folder / "safe" / f"{name}.png")
    for name in ("012", "030"):
        (folder / "safe" / f"{name}.png").write_bytes(dark("x").read())
    return folder


def test_a_resumed_build_is_the_uninterrupted_one_byte_for_byte(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at every sync and rename of the first run, one after the other in one work dir."""
    uninterrupted = build_pools(many, tmp_path / "one", encoder=PickyEncoder())
    real = {name: getattr(os, name) for name in ("fsync", "replace")}
    budget = [0]

    def fused(name: str) -> Callable[..., None]:
        def call(*arguments: object) -> None:
            budget[0] -= 1
            if budget[0] < 0:
                raise KilledError
            real[name](*arguments)

        return call

    for name in real:
        monkeypatch.setattr(os, name, fused(name))
    kills = 0
    while True:
        budget[0] = kills % 4  # too few to finish a part, then enough for one, and so on
        try:
            resumed = build_pools(many, tmp_path / "two", encoder=PickyEncoder())
            break
        except KilledError:
            kills += 1
            assert kills < 100
    monkeypatch.undo()
    assert kills >= 2 * PARTS
    assert version_of(resumed) == version_of(uninterrupted)
    assert resumed.contents.embeddings.tobytes() == uninterrupted.contents.embeddings.tobytes()
    assert resumed.contents.exemplars == uninterrupted.contents.exemplars
    assert resumed.report_path.read_bytes() == uninterrupted.report_path.read_bytes()
    assert (resumed.n_entries, resumed.skipped) == (uninterrupted.n_entries, uninterrupted.skipped)
    assert resumed.skipped == {"UnsupportedFormat": 3, "DuplicateImage": 3, "NonFiniteEmbedding": 2}


def test_finished_parts_are_not_encoded_again(many: Path, tmp_path: Path) -> None:
    first = build_pools(many, tmp_path / "work")
    encoder = PickyEncoder()
    again = build_pools(many, tmp_path / "work", encoder=encoder)
    assert encoder.batches == []
    assert version_of(again) == version_of(first)
    last = sorted((tmp_path / "work" / "parts").iterdir())[-1]
    last.unlink()
    again = build_pools(many, tmp_path / "work", encoder=encoder)
    assert 0 < sum(encoder.batches) <= 2 * BATCHES_PER_PART
    assert last.exists()
    WorkDir(tmp_path / "work").discard_parts()
    assert sorted(p.name for p in (tmp_path / "work").iterdir()) == [".lock", "report.csv"]
    build_pools(many, tmp_path / "work", batch_size=3)  # nothing is left that could contradict


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"encoder": ToyEncoder(seed=1)}, "encoder_fingerprint"),
        ({"batch_size": 3}, "batch_size 2, not 3"),
        ({"limits": ImageLimits(max_pixels=5)}, "limits"),
    ],
)
def test_another_plan_is_refused(
    write_images: WriteImages, tmp_path: Path, options: dict[str, object], complaint: str
) -> None:
    folder = write_images(2)
    build_pools(folder, tmp_path / "work")
    with pytest.raises(BuildError, match=complaint):
        build_pools(folder, tmp_path / "work", **options)
    with pytest.raises(BuildError, match="source"):
        build_pools(write_images(2, folder="other"), tmp_path / "work")


def remove(folder: Path) -> None:
    (folder / "safe" / "001.png").unlink()


def rewrite(folder: Path) -> None:
    (folder / "safe" / "001.png").write_bytes(encoded(synthetic_image(5)))


def add_within(folder: Path) -> None:
    (folder / "safe" / "0001.png").write_bytes(b"x")


def add_at_the_end(folder: Path) -> None:
    (folder / "unsafe" / "z.png").write_bytes(b"x")


@pytest.mark.parametrize("change", [remove, rewrite, add_within, add_at_the_end])
def test_a_changed_source_is_refused(write_images: WriteImages, tmp_path: Path, change: Callable[[Path], None]) -> None:
    folder = write_images(3)
    build_pools(folder, tmp_path / "work")
    change(folder)
    with pytest.raises(BuildError, match="the source has changed at"):
        build_pools(folder, tmp_path / "work")


def test_a_changed_label_is_refused(write_images: WriteImages, tmp_path: Path) -> None:
    folder = write_images(1)
    for label, matcher in (("safe", None), ("unsafe", "the source has changed")):
        (folder / "list.csv").write_text(f"path,label\nsafe/000.png,{label}\n")
        source = ManifestSource(folder / "list.csv", "pools")
        if matcher is None:
            build(ToyEncoder(), source, collection="pools", work_dir=tmp_path / "work")
        else:
            with pytest.raises(BuildError, match=matcher):
                build(ToyEncoder(), source, collection="pools", work_dir=tmp_path / "work")


def test_a_damaged_work_dir_is_refused(write_images: WriteImages, tmp_path: Path) -> None:
    folder = write_images(20)
    build_pools(folder, tmp_path / "work")
    part = tmp_path / "work" / "parts" / "00000.safetensors"
    data = part.read_bytes()
    for bad in (b"", data[:-1], data[:100]):
        part.write_bytes(bad)
        with pytest.raises(BuildError, match=r"00000\.safetensors is damaged"):
            build_pools(folder, tmp_path / "work")
    part.unlink()
    with pytest.raises(BuildError, match="parts are missing"):
        build_pools(folder, tmp_path / "work")
    (tmp_path / "work" / "plan.json").write_text("{")
    with pytest.raises(BuildError, match=r"plan\.json cannot be read"):
        build_pools(folder, tmp_path / "work")


def test_one_build_at_a_time(write_images: WriteImages, tmp_path: Path) -> None:
    folder = write_images(2)
    with (
        WorkDir(tmp_path / "work").hold({"other": "plan"}),
        pytest.raises(BuildError, match="another build is running"),
    ):
        build_pools(folder, tmp_path / "work")
    build_pools(folder, tmp_path / "work")


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "images" / "safe").mkdir(parents=True)
    with pytest.raises(BuildError, match="none of 0 entries"):
        build_pools(tmp_path / "images", tmp_path / "work")
    (tmp_path / "images" / "safe" / "a.png").write_bytes(b"")
    with pytest.raises(BuildError, match=r"none of 1 entries could be used; see .*report.csv"):
        build_pools(tmp_path / "images", tmp_path / "work")
    assert "safe/a.png" in (tmp_path / "work" / "report.csv").read_text()


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(InvalidName):
        build(ToyEncoder(), Items(), collection="a/b", work_dir=tmp_path / "work")
    with pytest.raises(BuildError, match="batch_size must be at least 1, got 0"):
        build(ToyEncoder(), Items(), collection="pools", work_dir=tmp_path / "work", batch_size=0)
    with pytest.raises(InvalidLabel):
        build(ToyEncoder(), Items(item("a", label="x")), collection="pools", work_dir=tmp_path / "work")


def test_report_survives_any_name(tmp_path: Path) -> None:
    source = Items(item("a", 1), Skipped('quote"\n,\\xff', "s", "E", "lone \udcff"))
    report = build(ToyEncoder(), source, collection="pools", work_dir=tmp_path / "work")
    assert report_of(report) == {'quote"\n,\\xff': ("E", "lone \\udcff")}
