"""The 13 zero-shot sets and ImageNet as they are published: images, class names and prompts (methods 6.9).

A set's folder is one of the `wds_*` data sets of CLIP_benchmark: `test/nshards.txt` with `test/0.tar` and so on
(`<key>.webp`, `.png` or `.jpg` beside `<key>.cls` with the class's number from 0), and beside `test` the files
`classnames.txt`, a name a line in the order of the numbers, and `zeroshot_classification_templates.txt`, a prompt a
line with `{c}` for the name. Instead of shards there may be folders, `test/<number or name>/<image>`. Prompts and names
may also come from CLIP_benchmark's own files, `en_classnames.json` and `en_zeroshot_classification_templates.json`,
which hold them by set. Everything is read as bytes and text by our own readers.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from offline.data.classes import is_integer, own_names
from offline.data.examples import UNLABELLED, Labels
from offline.data.labelled import LabelledImages, open_images
from offline.errors import DataError, OfflineError, PlanError

CLASS_NAMES, TEMPLATES, SHARDS = "classnames.txt", "zeroshot_classification_templates.txt", "nshards.txt"
PLACE = "{c}"
LAYOUT = (
    f"a folder such as wds_vtab-cifar10 with {CLASS_NAMES}, {TEMPLATES} and test/0.tar, ... (or test/<class>/<image>); "
    "download the data sets wds_* of the organisation clip-benchmark from the model hub"
)
_FIRST = 3  # problems that one message names


@dataclass(frozen=True)
class ZeroShotSet:
    """One set.

    Attributes:
        name: as CLIP_benchmark calls it after `wds/`.
        templates: how many prompts it has in the published evaluation.
        native_px: side of images that are attacked at their own size; 0 for those that are attacked as the encoder
            takes them.
        prompts: its name in CLIP_benchmark's JSON files, where that is not the last part of `name`.
    """

    name: str
    templates: int
    native_px: int = 0
    prompts: str = ""

    @property
    def short(self) -> str:
        """The last part of the name."""
        return self.name.rpartition("/")[2]

    @property
    def folders(self) -> tuple[str, ...]:
        """Names that its folder may have."""
        return f"wds_{self.name.replace('/', '-')}", self.name.replace("/", "-"), self.short


THIRTEEN = (
    ZeroShotSet("vtab/cifar10", 18, native_px=32),
    ZeroShotSet("vtab/cifar100", 18, native_px=32),
    ZeroShotSet("stl10", 2, native_px=96),
    ZeroShotSet("cars", 8),
    ZeroShotSet("vtab/caltech101", 34),
    ZeroShotSet("vtab/pets", 1),
    ZeroShotSet("vtab/flowers", 1),
    ZeroShotSet("vtab/dtd", 8),
    ZeroShotSet("vtab/eurosat", 3),
    ZeroShotSet("fgvc_aircraft", 2),
    ZeroShotSet("vtab/pcam", 2),
    ZeroShotSet("imagenet-r", 80, prompts="imagenet1k"),
    ZeroShotSet("imagenet_sketch", 80, prompts="imagenet1k"),
)


IMAGENET = ZeroShotSet("imagenet1k", 80)
IMAGENET_LAYOUT = (
    "val/<wnid>/*.JPEG with ImageNet's 1,000 classes (the validation images of ILSVRC 2012, sorted into folders; the "
    "published figures are of RobustBench's 5,000, and any folder of 5,000 is used whole), or wds_imagenet1k"
)


@dataclass(frozen=True, eq=False)
class OpenedSet:
    """A set whose files have been found and understood; no image has been decoded.

    Attributes:
        spec: which.
        images: all of the test split.
        labels: (n,) the class of each of `images.class_names`.
        class_names: by class the word for prompts.
        templates: prompts with one `{}` each.
    """

    spec: ZeroShotSet
    images: LabelledImages
    labels: Labels
    class_names: tuple[str, ...]
    templates: tuple[str, ...]


@dataclass(frozen=True)
class Prompts:
    """What CLIP_benchmark's JSON files hold: class names and templates, by set."""

    class_names: Mapping[str, Sequence[str]]
    templates: Mapping[str, Sequence[str]]

    @classmethod
    def load(cls, paths: Sequence[Path]) -> "Prompts":
        """Read files of `{set: [text]}`; one whose texts hold `{c}` has templates, any other one class names.

        Raises:
            DataError: a file has another layout.
        """
        names: dict[str, Sequence[str]] = {}
        templates: dict[str, Sequence[str]] = {}
        for path in paths:
            table = _json(path)
            texts = [text for of_set in table.values() for text in of_set]
            target = templates if any(PLACE in text for text in texts) else names
            target.update(table)
        return cls(names, templates)


def open_sets(root: Path, specs: Sequence[ZeroShotSet], prompts: Prompts, *, all_of_them: bool) -> list[OpenedSet]:
    """Open those sets that a folder holds.

    Args:
        root: with a folder a set.
        specs: which sets.
        prompts: for sets without files of their own.
        all_of_them: a missing one is an error.

    Raises:
        DataError: a set is malformed, or missing and not to be, or there is none; names the first problems at once.
    """
    opened, problems, missing = [], [], []
    for spec in specs:
        folder = next((root / name for name in spec.folders if (root / name).is_dir()), None)
        if folder is None:
            missing.append(spec.folders[0])
            continue
        try:
            opened.append(open_set(folder, spec, prompts))
        except (DataError, PlanError) as error:
            problems.append(str(error))
    if missing and (all_of_them or len(missing) == len(specs)):
        problems.insert(0, f"{root} lacks {', '.join(missing)}")
    if problems:
        more = f"; and {len(problems) - _FIRST} more problems" if len(problems) > _FIRST else ""
        raise DataError("zero-shot", f"{'; '.join(problems[:_FIRST])}{more}; expected {LAYOUT}")
    return opened


def open_set(folder: Path, spec: ZeroShotSet, prompts: Prompts) -> OpenedSet:
    """Open one set.

    Raises:
        DataError: it has another layout, or a label has no class.
    """
    key = spec.prompts or spec.short
    class_names = _lines(folder / CLASS_NAMES) or tuple(prompts.class_names.get(key, ()))
    written = _lines(folder / TEMPLATES) or tuple(prompts.templates.get(key, ()))
    if not class_names or not written:
        raise DataError(spec.name, f"{folder} lacks {CLASS_NAMES if not class_names else TEMPLATES}")
    for template in written:
        if template.count(PLACE) != 1 or re.search(r"[{}]", template.replace(PLACE, "")):
            raise DataError(spec.name, f"{folder / TEMPLATES}: {template!r} must hold {PLACE} once, and no other brace")
    images = _images(folder / "test", spec)
    if images.problems:
        first = ", ".join(images.problems[:_FIRST])
        raise DataError(spec.name, f"{len(images.problems)} files cannot be used, e.g. {first}")
    labels = _labels(images, class_names, spec)
    return OpenedSet(spec, images, labels, class_names, tuple(template.replace(PLACE, "{}") for template in written))


def open_imagenet(root: Path) -> OpenedSet:
    """ImageNet's validation images with OpenAI's names and its 80 prompts, or the data set `wds_imagenet1k`.

    Raises:
        DataError: the folder has another layout.
    """
    if (root / IMAGENET.folders[0]).is_dir():
        return open_set(root / IMAGENET.folders[0], IMAGENET, Prompts({}, {}))
    from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

    try:
        images = open_images("folder", root / "val", class_names="imagenet", name="val")
    except OfflineError as error:
        raise DataError("ImageNet", f"{error}; expected {IMAGENET_LAYOUT}") from error
    words = tuple(names[0] for names in images.class_names)
    templates = tuple(str(template("{}")) for template in OPENAI_IMAGENET_TEMPLATES)
    return OpenedSet(IMAGENET, images, np.arange(len(words)), words, templates)


def _images(test: Path, spec: ZeroShotSet) -> LabelledImages:
    if not test.is_dir():
        raise DataError(spec.name, f"{test} is not there")
    shards = sorted(test.glob("*.tar"))
    announced = _lines(test / SHARDS)
    if announced:
        expected = [test / f"{number}.tar" for number in range(int(announced[0]) if is_integer(announced[0]) else -1)]
        missing = [path.name for path in expected if not path.is_file()]
        if missing or not expected:
            raise DataError(spec.name, f"{test / SHARDS} says {announced[0]}, missing: {', '.join(missing[:_FIRST])}")
        shards = expected
    return open_images("tar", shards, name=spec.short) if shards else open_images("folder", test, name=spec.short)


def _labels(images: LabelledImages, class_names: Sequence[str], spec: ZeroShotSet) -> Labels:
    """The class of each label that the images have: by its number, or by its name."""
    if not images.class_names:
        raise DataError(spec.name, "no image has a class: shards need <key>.cls beside <key>.jpg, folders a sub-folder")
    words = [own_names(name)[0].casefold() for name in class_names]
    found = []
    for word, *_ in images.class_names:
        if is_integer(word) and int(word) < len(class_names):
            found.append(int(word))
        elif words.count(word.casefold()) == 1:
            found.append(words.index(word.casefold()))
        else:
            raise DataError(spec.name, f"the label {word!r} is none of {len(class_names)} classes in {CLASS_NAMES}")
    return np.array(found, dtype=np.int64)


def label_of(opened: OpenedSet, label: int, identity: str) -> int:
    """The class of an image by its label in `opened.images`.

    Raises:
        DataError: it has none.
    """
    if label == UNLABELLED:
        raise DataError(opened.spec.name, f"image {identity!r} has no class")
    return int(opened.labels[label])


def _lines(path: Path) -> tuple[str, ...]:
    """The lines of a text file that are not blank; none where there is no such file."""
    try:
        return tuple(line.strip() for line in path.read_text("utf8").splitlines() if line.strip())
    except FileNotFoundError:
        return ()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(str(path), f"cannot be read: {error}") from error


def _json(path: Path) -> dict[str, list[str]]:
    try:
        table: Any = json.loads(path.read_text("utf8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(str(path), f"cannot be read as JSON: {error}") from error
    if not isinstance(table, dict) or not all(
        isinstance(texts, list) and all(isinstance(text, str) for text in texts) for texts in table.values()
    ):
        raise DataError(str(path), "must be an object of {set: [text]}, as CLIP_benchmark's en_*.json are")
    return table
