"""Class names, several sets as one, threads and processes, and the real archives."""

import json
import multiprocessing
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offline.data.archives import data_root
from offline.data.classes import IMAGENET_CLASSES, index_classes, join_classes, name_classes
from offline.data.examples import PackedNames
from offline.data.labelled import KINDS, LabelledImages, joined, open_images
from offline.errors import DataError, DataMissing, PlanError
from tests.offline.data_layouts import folder, labelled_zip, mosaic_zip, samples, shard, table_of

Make = Callable[[Path], LabelledImages]
WNIDS = [f"n{number:08d}" for number in range(IMAGENET_CLASSES)]


def one_of_each(root: Path) -> list[LabelledImages]:
    """A set of each kind, in the order of KINDS."""
    rows = [{"file": "b/1.webp", "class": "cat"}, {"file": "b/2.webp", "class": "tench"}]
    return [
        open_images("folder", folder(root / "f", ["cat/1.png", "polar_bear/2.png", "3.png"])),
        open_images("labelled-zip", labelled_zip(root / "z.zip", rows)),
        open_images("mosaic", mosaic_zip(root / "m.zip", {"n2": ("tench, Tinca tinca", 5), "n1": ("Cat, tomcat", 4)})),
        open_images("tar", shard(root / "t.tar", samples(["sea_lion", "cat"]))),
    ]


# --- class names -----------------------------------------------------------------------------------------------------


@given(st.lists(st.none() | st.sampled_from(["10", "9", "0", "cat", "a b"]), max_size=12))
def test_labels_are_numbered_in_order(labels: list[str | None]) -> None:
    indices, found = index_classes(labels)
    assert [None if i < 0 else found[i] for i in indices] == labels
    words = {label for label in labels if label is not None}
    numeric = words <= {"10", "9", "0"}
    assert list(found) == (sorted(words, key=int) if numeric else sorted(words))


def test_labels_are_their_own_names() -> None:
    assert name_classes(["polar_bear", "jack-o-lantern", "tench, Tinca tinca", "-"], None) == (
        ("polar bear",), ("jack o lantern",), ("tench", "Tinca tinca"), ("-",),
    )  # fmt: skip


def test_imagenet_names_go_by_number_or_rank_of_the_wordnet_id() -> None:
    numbers = name_classes([str(n) for n in range(IMAGENET_CLASSES)], "imagenet")
    assert len(numbers) == IMAGENET_CLASSES
    assert (numbers[0], numbers[388], numbers[999]) == (("tench",), ("giant panda",), ("toilet paper",))
    assert name_classes(WNIDS, "imagenet") == numbers


@pytest.mark.parametrize(
    "labels",
    [[str(n) for n in range(1, 1001)], [str(n) for n in range(999)], WNIDS[:-1], [*WNIDS[:-1], "x"], [], ["0" * 9]],
    ids=["from 1", "999 numbers", "999 ids", "a word", "none", "zeros"],
)
def test_imagenet_names_need_imagenets_classes(labels: list[str]) -> None:
    with pytest.raises(PlanError, match=f"exactly 1000 classes.*the data has {len(labels)}"):
        name_classes(labels, "imagenet")


def test_names_from_a_file(tmp_path: Path) -> None:
    root, names = folder(tmp_path / "f", ["n01/1.png", "n02/2.png"]), tmp_path / "names.json"
    names.write_text(json.dumps({"n02": ["tench", "Tinca tinca"], "n01": ["koala"], "n03": []}))
    assert open_images("folder", root, class_names=names).class_names == (("koala",), ("tench", "Tinca tinca"))
    for wrong, message in (
        ({"n01": ["koala"]}, "lack 1 of 2 labels, e.g. 'n02'"),
        ({"n01": ["koala"], "n02": []}, "'n02' must have a list of names"),
        ({"n01": ["koala"], "n02": "tench"}, "'n02' must have a list of names"),
        ([], "must be an object"),
    ):
        names.write_text(json.dumps(wrong))
        with pytest.raises(PlanError, match=message):
            open_images("folder", root, class_names=names)
    names.write_text("{")
    with pytest.raises(PlanError, match="cannot be read"):
        open_images("folder", root, class_names=names)


# --- opening and joining ---------------------------------------------------------------------------------------------


def test_what_does_not_fit_a_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=f"kind must be one of {', '.join(KINDS)}, got 'Tar'"):
        open_images("Tar", tmp_path)
    with pytest.raises(PlanError, match="brings its class names"):
        open_images("mosaic", tmp_path, class_names="imagenet")
    with pytest.raises(PlanError, match="takes one path, got 2"):
        open_images("folder", [tmp_path, tmp_path])
    for kind in KINDS:
        with pytest.raises(PlanError, match="needs a path"):
            open_images(kind, [])
        with pytest.raises(DataMissing, match="absent"):
            open_images(kind, tmp_path / "absent")
        if kind != "labelled-zip":
            with pytest.raises(PlanError, match="where selects rows"):
                open_images(kind, tmp_path, where={"split": "train"})
    with pytest.raises(DataError, match="holds no image"):
        open_images("folder", tmp_path)
    with pytest.raises(DataError, match="nothing to join"):
        joined([])


def test_joined_sets_have_one_list_of_classes(tmp_path: Path) -> None:
    parts = one_of_each(tmp_path)
    images = joined(parts)
    assert len(images) == sum(len(part) for part in parts) == 16
    assert images.starts == (0, 3, 5, 14)
    assert images.class_names == (("cat", "Cat", "tomcat"), ("polar bear",), ("tench", "Tinca tinca"), ("sea lion",))
    index = 0
    for part in parts:
        for own in range(len(part)):
            example, expected = images.read(index), part.read(own)
            assert example.id == images.id_of(index) == f"{part.name}/{expected.id}"
            assert np.array_equal(np.asarray(example.image), np.asarray(expected.image))
            own_names = part.class_names[expected.label] if expected.label >= 0 else ()
            assert set(own_names) <= set(images.class_names[example.label] if example.label >= 0 else ())
            assert (example.label < 0) == (expected.label < 0)
            index += 1
    assert len({images.id_of(i) for i in range(16)}) == 16
    for outside in (-1, 16):
        with pytest.raises(IndexError):
            images.read(outside)


def test_classes_of_one_set_stay_apart_though_they_share_a_word() -> None:
    part = (("sunglass", "shades"), ("sunglass",), ("crane",))
    joint, maps = join_classes([part, (("Crane",), ("sunglass",)), (), part])
    assert joint == (("sunglass", "shades"), ("sunglass",), ("crane", "Crane"))
    assert [m.tolist() for m in maps] == [[0, 1, 2], [2, 0], [], [0, 1, 2]]


@given(st.lists(st.text(max_size=5) | st.just("caf\udce9.png"), max_size=8))
def test_packed_names_are_the_names(names: list[str]) -> None:
    packed = PackedNames(names)
    assert list(packed) == names
    assert packed[1:] == names[1:]


# --- threads and processes -------------------------------------------------------------------------------------------


def pixels_of(images: LabelledImages, order: list[int]) -> dict[int, bytes]:
    return {i: images.read(i).image.tobytes() for i in order}


def test_threads_read_the_same_as_one(tmp_path: Path) -> None:
    images = joined(one_of_each(tmp_path))
    again = joined(one_of_each(tmp_path / "again"))
    expected = pixels_of(images, list(range(len(images))))
    orders = [np.random.default_rng(seed).permutation(len(images)).tolist() for seed in range(8)]
    with ThreadPoolExecutor(8) as threads:
        for found in threads.map(lambda order: pixels_of(again, order), orders):
            assert found == expected


def test_forked_processes_and_copies_read_the_same(tmp_path: Path) -> None:
    images = joined(one_of_each(tmp_path))
    order = list(range(len(images)))
    expected = pixels_of(images, order[::2])  # some mosaics are decoded before the fork
    expected |= {i: value for i, value in pixels_of(images, order).items() if i not in expected}
    copy = pickle.loads(pickle.dumps(images))  # noqa: S301  # what spawned workers get
    assert pixels_of(copy, order) == expected
    assert table_of(copy) == table_of(images)
    context = multiprocessing.get_context("fork")
    ends = []
    for seed in range(2):
        receiver, sender = context.Pipe(duplex=False)
        turns = np.random.default_rng(seed).permutation(len(images)).tolist()
        process = context.Process(target=lambda end, turns: end.send(pixels_of(images, turns)), args=(sender, turns))
        process.start()
        ends.append((process, receiver))
    for process, receiver in ends:
        assert receiver.poll(30)
        assert receiver.recv() == expected
        process.join(10)
        assert process.exitcode == 0


def test_a_set_keeps_no_file_open(tmp_path: Path) -> None:
    images = joined(one_of_each(tmp_path))
    table_of(images)
    opened = [str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert not [path for path in opened if path.startswith(str(tmp_path))]


DATA = data_root()

# --- the real archives -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not (DATA / "train").is_dir(), reason="HARDLOOK_DATA has no train/: there are no archives to open")
def test_the_training_archives_open_with_all_their_images() -> None:
    train = DATA / "train"
    tiles = open_images("mosaic", [train / f"tiny196_64px_train_{part}.zip" for part in "ab"])
    objects = open_images("labelled-zip", train / "caltech101_128px.zip", where={"suggested_split": "train"})
    scenes = open_images("labelled-zip", train / "flickr8k_128px_train_val.zip", where={"split": "train"})
    assert [len(images) for images in (tiles, objects, scenes)] == [49_000, 3_073, 5_800]
    assert [len(images.class_names) for images in (tiles, objects, scenes)] == [196, 101, 0]
    together = joined([tiles, objects, scenes])
    assert together.problems == ()
    for index in np.random.default_rng(0).integers(len(together), size=20).tolist():
        example = together.read(index)
        assert example.image.mode == "RGB"
        assert min(example.image.size) >= 64
        assert (example.label < 0) == (index >= 49_000 + 3_073)
    assert together.class_names[together.read(0).label] == ("goldfish", "Carassius auratus")
