"""The images of an audit, by their plan: which ones, in which order, and under which ids."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL.Image import Image

from offline.audit.plan import ImagesPlan
from offline.data.classes import Naming
from offline.data.labelled import LabelledImages, open_images
from offline.demo_pools import TaskImage, read_task
from offline.errors import DataError, PlanError
from perception.errors import ImageError
from perception.verdict import PoolLabel

DEMO, DEMO_EXEMPLARS = "demo", "demo-exemplars"
VIEW_MARK = "#"
"""Between the id of an image and the name of a view of it: the demo pools hold views of their unsafe exemplars."""


@dataclass(frozen=True, eq=False)
class LoadedImage:
    """An image of a set.

    Attributes:
        id: within the set.
        image: RGB.
        class_name: of its class the first name; '' for an unlabelled image.
        class_index: into the names of the set's classes; -1 for an unlabelled image.
    """

    id: str
    image: Image
    class_name: str
    class_index: int = -1


def read_images(
    images: ImagesPlan, data: Path, seed: int, *, without: Collection[str] = (), problems: list[str] | None = None
) -> list[LoadedImage]:
    """Read the images of a set: all in their own order, or the first `limit` of a seeded shuffle.

    Args:
        images: which.
        data: folder that relative paths start from.
        seed: of the shuffle.
        without: ids that do not take part, such as those of the attacker's targets.
        problems: takes in what could not be read, and why; such images are passed over.

    Raises:
        DataMissing, DataError: the set cannot be opened, or nothing in it can be read.
        PlanError: the plan does not fit the set.
    """
    found: list[LoadedImage] = []
    for image in _in_order(images, data, seed, without, [] if problems is None else problems):
        found.append(image)
        if len(found) == images.limit:
            break
    if not found:
        raise DataError(images.set_name, "has no image that can be read and takes part")
    return found


def _in_order(
    images: ImagesPlan, data: Path, seed: int, without: Collection[str], problems: list[str]
) -> Iterator[LoadedImage]:
    if images.kind in (DEMO, DEMO_EXEMPLARS):
        demo = [image for image in _demo(images, data) if image.id not in without]
        for i in _order(len(demo), images.limit, seed):
            yield LoadedImage(demo[i].id, demo[i].example.image, demo[i].example.label)
        return
    opened = open_set(images, data)
    problems += opened.problems
    for i in _order(len(opened), images.limit, seed):
        if opened.id_of(i) in without:
            continue
        try:
            example = opened.read(i)
        except (ImageError, OSError) as error:
            problems.append(f"{opened.id_of(i)}: {error}")
            continue
        name = opened.class_names[example.label][0] if example.label >= 0 else ""
        yield LoadedImage(example.id, example.image, name, example.label)


def open_set(images: ImagesPlan, data: Path) -> LabelledImages:
    """Open a set of labelled images; raises as `read_images`."""
    naming: Naming = None
    if images.class_names:
        naming = "imagenet" if images.class_names == "imagenet" else data / images.class_names
    paths = [data / path for path in images.paths]
    if not paths:
        raise PlanError(f"a set of kind {images.kind!r} needs a path")
    return open_images(
        images.kind, paths if len(paths) > 1 else paths[0], where=images.where, class_names=naming, name=images.set_name
    )


def _order(count: int, limit: int, seed: int) -> list[int]:
    if not limit:
        return list(range(count))
    order: list[int] = np.random.default_rng(seed).permutation(count).tolist()
    return order


def _demo(images: ImagesPlan, data: Path) -> list[TaskImage]:
    """The demo task's images of the plan's label: those kept back from the pools, or the unsafe exemplars."""
    if images.path or images.where or images.class_names or not images.label:
        raise PlanError(f"a set of kind {images.kind!r} takes a label, and no path, where or class_names")
    if images.kind == DEMO_EXEMPLARS and images.label != "unsafe":
        raise PlanError(f"kind {DEMO_EXEMPLARS!r} is for the label 'unsafe', got {images.label!r}")
    wanted = images.kind == DEMO_EXEMPLARS
    pool = PoolLabel(images.label)
    return [image for image in read_task(data) if image.pool is pool and image.is_exemplar is wanted]


def image_of(exemplar_id: str) -> str:
    """The id of the image that an exemplar shows: its own without the name of a view."""
    return exemplar_id.partition(VIEW_MARK)[0]
