"""Pictures of a few audited images and of their neighbours, in the run directory, where the plan asks for them.

Images are kept nowhere else, and not without being asked for.
"""

import hashlib
import io
import re
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from offline.audit.plan import AuditPlan
from offline.audit.queries import DEMO
from offline.audit.record import EXAMPLES_FOLDER, AuditRecord
from offline.demo_pools import exemplars_of, read_task
from offline.runs import write_atomically
from perception.encoder import open_image
from perception.errors import ImageError
from perception.testing import benign_hits

NEIGHBORS_FOLDER = "neighbors"
NEIGHBOR_PX = 128
SHOWN = 3
"""Neighbours of each version of an image whose pictures are kept."""
MAGNIFIED = 10.0


class ExamplePictures:
    """Writes the pictures of one system's examples."""

    def __init__(self, run: Path, data: Path, plan: AuditPlan, system: str) -> None:
        self._folder, self._data, self._plan, self._system = run / EXAMPLES_FOLDER, data, plan, system

    def keep(
        self, record: AuditRecord, position: int, clean: NDArray[np.uint8], attacked: NDArray[np.uint8], delta: Tensor
    ) -> AuditRecord:
        """Keep the pictures of an image if it is one of the first of its set.

        Args:
            record: of the image.
            position: of the image within its set, from 0.
            clean, attacked: (3, h, w) uint8.
            delta: (3, h, w) the perturbation before rounding.

        Returns:
            The record, with the name of its pictures if they were kept.
        """
        if position >= self._plan.examples:
            return record
        stem = f"{_slug(self._system)}-{_slug(record.set)}-{position:03d}"
        (self._folder / NEIGHBORS_FOLDER).mkdir(parents=True, exist_ok=True)
        magnified = (delta * MAGNIFIED + 0.5).clamp(0, 1).mul(255).round().byte().cpu().numpy()
        for name, pixels in (("clean", clean), ("attacked", attacked), ("delta", magnified)):
            picture = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
            write_atomically(self._folder / f"{stem}-{name}.png", _png(picture))
        near = [n for judged in (record.clean, record.attacked) for n in judged.neighbors[:SHOWN]]
        self._keep_neighbors(n.id for n in near)
        return replace(record, example=stem)

    def _keep_neighbors(self, ids: Iterable[str]) -> None:
        for exemplar in ids:
            path = self._folder / neighbor_picture(exemplar)
            if path.exists():
                continue
            picture = self._neighbor(exemplar)
            if picture is not None:
                picture.thumbnail((NEIGHBOR_PX, NEIGHBOR_PX))
                write_atomically(path, _png(picture))

    def _neighbor(self, exemplar: str) -> Image.Image | None:
        source = self._plan.neighbor_images
        if source == DEMO:
            found = self._demo.get(exemplar)
            return None if found is None else found.copy()
        if not source:
            return None
        root = (self._data / source).resolve()
        path = (root / exemplar).resolve()
        if not path.is_relative_to(root):  # an id is data, and may hold '..'
            return None
        try:
            return open_image(path).copy()
        except (OSError, ImageError):
            return None  # a picture that is missing costs the report a picture, not the audit its figures

    @cached_property
    def _demo(self) -> dict[str, Image.Image]:
        """All exemplars of the demo pools."""
        exemplars = {image.id: image.example.image for image in exemplars_of(read_task(self._data))}
        return exemplars | {hit.id: open_image(hit.file) for hit in benign_hits()}


def neighbor_picture(exemplar: str) -> str:
    """Where a neighbour's picture lies within the folder of examples; ids are no file names."""
    return f"{NEIGHBORS_FOLDER}/{hashlib.sha256(exemplar.encode()).hexdigest()[:16]}.png"


def _slug(name: str) -> str:
    """A file name's part that no two names share."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-") + "-" + hashlib.sha256(name.encode()).hexdigest()[:6]


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()
