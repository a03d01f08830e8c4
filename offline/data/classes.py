"""Classes of a set of images: from labels as they are written to indices, and from those to names for prompts.

Owns the order of classes, their names, and how the classes of several sets become one list.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from offline.data.examples import UNLABELLED, ClassNames, Labels
from offline.errors import PlanError

# Where names come from: a JSON file of {label: [names]}, ImageNet's thousand, or the labels themselves.
Naming = Path | Literal["imagenet"] | None
IMAGENET_CLASSES = 1000
_WNID = re.compile(r"n[0-9]{8}")


def index_classes(labels: Sequence[str | None]) -> tuple[Labels, tuple[str, ...]]:
    """Number the distinct labels in their order: by value where all are integers, else by character.

    Returns:
        (n,) indices, -1 for None, and the distinct labels by index.
    """
    found = sorted({label for label in labels if label is not None})
    if all(is_integer(label) for label in found):
        found.sort(key=int)
    position = {label: index for index, label in enumerate(found)}
    indices = (UNLABELLED if label is None else position[label] for label in labels)
    return np.fromiter(indices, np.int64, len(labels)), tuple(found)


def is_integer(text: str) -> bool:
    """Whether a label is a plain decimal number."""
    return text.isascii() and text.isdecimal()


def name_classes(labels: Sequence[str], naming: Naming) -> ClassNames:
    """Give each of the distinct labels, in order, its names.

    Raises:
        PlanError: the naming does not fit the labels.
    """
    if naming is None:
        return tuple(own_names(label) for label in labels)
    if naming == "imagenet":
        return _imagenet_names(labels)
    return _names_from_file(labels, naming)


def own_names(label: str) -> tuple[str, ...]:
    """A label as names: 'polar_bear' -> 'polar bear'; commas separate synonyms, as in WordNet."""
    names = tuple(name for part in label.split(",") if (name := part.translate({95: " ", 45: " "}).strip()))
    return names or (label,)


def _imagenet_names(labels: Sequence[str]) -> ClassNames:
    """OpenAI's names of ImageNet-1k, by class number or by the rank of the WordNet id."""
    if all(is_integer(label) for label in labels):
        fits = [int(label) for label in labels] == list(range(IMAGENET_CLASSES))
    else:
        fits = len(labels) == IMAGENET_CLASSES and all(_WNID.fullmatch(label) for label in labels)
    if not fits:
        shown = f"{len(labels)} classes" + (f" from {labels[0]!r} to {labels[-1]!r}" if labels else "")
        raise PlanError(
            "class_names 'imagenet' needs exactly 1000 classes, numbered 0 to 999 or named by WordNet ids; "
            f"the data has {shown}. A JSON file of {{label: [names]}} names any others."
        )
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

    return tuple((str(name),) for name in IMAGENET_CLASSNAMES)


def _names_from_file(labels: Sequence[str], path: Path) -> ClassNames:
    try:
        table: Any = json.loads(path.read_text("utf8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PlanError(f"class names {path} cannot be read: {error}") from error
    if not isinstance(table, dict):
        raise PlanError(f"class names {path} must be an object of {{label: [names]}}")
    missing = [label for label in labels if label not in table]
    if missing:
        raise PlanError(f"class names {path} lack {len(missing)} of {len(labels)} labels, e.g. {missing[0]!r}")
    for label in labels:
        names = table[label]
        if not isinstance(names, list) or not names or not all(isinstance(n, str) and n.strip() for n in names):
            raise PlanError(f"class names {path}: {label!r} must have a list of names, got {names!r}")
    return tuple(tuple(table[label]) for label in labels)


def join_classes(parts: Iterable[ClassNames]) -> tuple[ClassNames, tuple[Labels, ...]]:
    """Make one list of the classes of several sets.

    Classes of different sets that share the word for prompts are one, since no text tells them apart. Within one set
    they stay apart (ImageNet has 'sunglasses' twice): the second of one set is the second of the other.

    Returns:
        The joint classes, and for each set its indices in the joint list.
    """
    joint: list[tuple[str, ...]] = []
    position: dict[tuple[str, int], int] = {}
    maps = []
    for part in parts:
        seen: Counter[str] = Counter()
        indices = []
        for names in part:
            word = names[0].casefold()
            index = position.setdefault((word, seen[word]), len(joint))
            seen[word] += 1
            if index == len(joint):
                joint.append(names)
            else:
                joint[index] = tuple(dict.fromkeys(joint[index] + names))
            indices.append(index)
        maps.append(np.array(indices, dtype=np.int64))
    return tuple(joint), tuple(maps)
