"""One list of classes for several sets of images of an audit."""

from collections.abc import Sequence
from pathlib import Path

from offline.audit.plan import ImagesPlan
from offline.audit.queries import LoadedImage, open_set
from offline.data.classes import join_classes
from offline.data.examples import ClassNames, Labels
from offline.errors import PlanError


def classes_of(sets: Sequence[ImagesPlan], data: Path) -> tuple[tuple[str, ...], ClassNames, tuple[Labels, ...]]:
    """Join the classes of sets by their first names; those of one name within a set stay apart.

    Returns:
        A word for each joint class that no two share ("crane", "crane (2)"), the classes' names, and for each set its
        classes' indices in the joint list.

    Raises:
        DataMissing, DataError: a set cannot be opened.
        PlanError: the plan does not fit a set, or sets name classes of one name differently, so that nobody knows which
            of them are the same.
    """
    parts = [open_set(images, data).class_names for images in sets]
    _require_told_apart(parts)
    names, maps = join_classes(parts)
    return _distinct([of[0] for of in names]), names, maps


def class_of(image: LoadedImage, images: ImagesPlan, indices: Labels) -> int:
    """The joint class of an image of a set, by its set's indices from `classes_of`.

    Raises:
        PlanError: the image is unlabelled.
    """
    if image.class_index < 0:
        raise PlanError(f"image {image.id!r} of {images.set_name!r} has no class: this task needs labelled queries")
    return int(indices[image.class_index])


def _require_told_apart(parts: Sequence[ClassNames]) -> None:
    """`join_classes` takes the second class of a name in one set for the second in another: see that they are."""
    known: dict[str, list[tuple[str, ...]]] = {}
    for part in parts:
        by_word: dict[str, list[tuple[str, ...]]] = {}
        for names in part:
            by_word.setdefault(names[0].casefold(), []).append(names)
        for word, classes in by_word.items():
            before = known.setdefault(word, classes)
            if max(len(before), len(classes)) > 1 and before != classes:
                raise PlanError(
                    f"sets of images name {len(before)} and {len(classes)} classes {word!r}: which are the same cannot "
                    "be told; give them different class_names"
                )


def _distinct(words: Sequence[str]) -> tuple[str, ...]:
    distinct: dict[str, None] = {}
    for word in words:
        count, name = 1, word
        while name in distinct:
            count += 1
            name = f"{word} ({count})"
        distinct[name] = None
    return tuple(distinct)
