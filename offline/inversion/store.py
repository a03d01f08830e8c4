"""What a run of inversions leaves behind: a picture and its exact values for each reconstruction, and a line about it.

    plan.json                                    what was asked
    records.jsonl, results.json                  one record a reconstruction, as it grows and in the end
    originals/ENCODER/TARGET.png                 the square that the encoder saw; images only
    reconstructions/ENCODER/TARGET-SEED.png      8 bits a value, for looking at
    reconstructions/ENCODER/TARGET-SEED.safetensors   `pixels` (3, h, w) float32 as found, `trace` (steps + 1,)
    grid.png, preview.png                        all of them, and how far it is

Files are written whole or not at all, and the line last: what has a line is complete.
"""

import hashlib
import io
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from offline.errors import RunError
from offline.jsonlines import JsonLines
from offline.runs import write_atomically
from perception.errors import ImageError
from perception.image import decode

RECORDS_NAME, RESULTS_NAME, GRID_NAME, PREVIEW_NAME = "records.jsonl", "results.json", "grid.png", "preview.png"
ORIGINALS, RECONSTRUCTIONS = "originals", "reconstructions"
_NAME_CHARACTERS = 80


@dataclass(frozen=True)
class Record:
    """One reconstruction, judged anew by the encoder that made it.

    Attributes:
        encoder, fingerprint: which encoder.
        target: id of the target.
        seed: of the start.
        start_similarity: cosine of the start with the target.
        similarity: cosine of the float pixels with the target.
        similarity_8bit: the same of the PNG.
        distance: l2 from the start, at the encoder's own size.
        radius: that it may have; None for an optimiser without a ball.
    """

    encoder: str
    fingerprint: str
    target: str
    seed: int
    start_similarity: float
    similarity: float
    similarity_8bit: float
    distance: float
    radius: float | None

    @classmethod
    def parse(cls, line: Any) -> "Record":
        """From a line's JSON value.

        Raises:
            ValueError: it is none.
        """
        if not isinstance(line, dict) or line.keys() != {field.name for field in fields(cls)}:
            raise ValueError("other keys than a reconstruction's")
        texts = all(isinstance(line[key], str) for key in ("encoder", "fingerprint", "target"))
        numbers = [line[key] for key in ("start_similarity", "similarity", "similarity_8bit", "distance")]
        if not (texts and isinstance(line["seed"], int) and all(isinstance(n, int | float) for n in numbers)):
            raise ValueError("a value has another type than a reconstruction's")
        return cls(**line)


class Store:
    """The files of one run directory."""

    def __init__(self, path: Path, encoders: Sequence[str], ids: Sequence[str]) -> None:
        """Name the files of all targets under all encoders."""
        self.path = path
        self._folders, self._names = file_names(encoders), file_names(ids)
        self._records = JsonLines(path / RECORDS_NAME)

    def records(self) -> list[Record]:
        """All that is complete, oldest first.

        Raises:
            RunError: a line is damaged.
        """
        return self._records.read(Record.parse)

    def add(self, records: Iterable[Record], pixels: Tensor, traces: Tensor) -> None:
        """Write reconstructions, and then their records.

        Args:
            records: b of them.
            pixels: (b, 3, h, w) float32 in [0, 1].
            traces: (b, steps + 1).
        """
        records = list(records)
        for record, found, trace in zip(records, pixels.cpu(), traces.cpu(), strict=True):
            at = self._reconstruction(record.encoder, record.target, record.seed)
            at.parent.mkdir(parents=True, exist_ok=True)
            tensors = {"pixels": found.float().contiguous().clone(), "trace": trace.float().contiguous().clone()}
            write_atomically(_with_end(at, ".safetensors"), save(tensors))
            write_picture(_with_end(at, ".png"), to_picture(found))
        self._records.append([asdict(record) for record in records])

    def add_original(self, encoder: str, target: str, picture: Image.Image) -> None:
        """Keep the square that an encoder saw."""
        at = self._original(encoder, target)
        at.parent.mkdir(parents=True, exist_ok=True)
        write_picture(at, picture)

    def original(self, encoder: str, target: str) -> Image.Image:
        """What `add_original` kept.

        Raises:
            RunError: it is not there, or damaged.
        """
        return read_picture(self._original(encoder, target))

    def picture(self, encoder: str, target: str, seed: int) -> Image.Image:
        """A reconstruction in 8 bits; raises as `original` does."""
        return read_picture(_with_end(self._reconstruction(encoder, target, seed), ".png"))

    def pixels(self, encoder: str, target: str, seed: int) -> Tensor:
        """A reconstruction as found, (3, h, w) float32; raises as `original` does."""
        path = _with_end(self._reconstruction(encoder, target, seed), ".safetensors")
        try:
            pixels: Tensor = load(path.read_bytes())["pixels"]
        except (OSError, SafetensorError, KeyError) as error:
            raise RunError(f"{path} is not there or damaged: {error}") from error
        if pixels.ndim != 3 or len(pixels) != 3 or not bool(((pixels >= 0) & (pixels <= 1)).all()):
            raise RunError(f"{path} does not hold pixels in [0, 1]")
        return pixels

    def has(self, encoder: str, target: str, seed: int) -> bool:
        """Whether both files of a reconstruction are there."""
        at = self._reconstruction(encoder, target, seed)
        return all(_with_end(at, end).is_file() for end in (".png", ".safetensors"))

    def write_results(self, head: dict[str, Any], records: Sequence[Record]) -> None:
        """Write results.json."""
        results = {**head, "reconstructions": [asdict(record) for record in records]}
        write_atomically(self.path / RESULTS_NAME, (json.dumps(results, indent=2) + "\n").encode())

    def _original(self, encoder: str, target: str) -> Path:
        return self.path / ORIGINALS / self._folders[encoder] / f"{self._names[target]}.png"

    def _reconstruction(self, encoder: str, target: str, seed: int) -> Path:
        return self.path / RECONSTRUCTIONS / self._folders[encoder] / f"{self._names[target]}-{seed}"


def file_names(ids: Sequence[str]) -> dict[str, str]:
    """A name for a file or a folder for each of different ids: readable, and different on any file system.

    Letters, digits, '_', '.' and '-' stay; where that shortens an id, or another has the same name but for upper case,
    part of a hash makes it unique.
    """
    plain = {id: re.sub(r"[^A-Za-z0-9._-]+", "-", id).lstrip(".-")[:_NAME_CHARACTERS] for id in ids}
    folded = [name.casefold() for name in plain.values()]
    return {
        id: name if name and len(id) <= _NAME_CHARACTERS and folded.count(name.casefold()) == 1 else _hashed(id, name)
        for id, name in plain.items()
    }


def to_picture(pixels: Tensor) -> Image.Image:
    """(3, h, w) in [0, 1] to the nearest of 8 bits."""
    return Image.fromarray(np.ascontiguousarray(to_8bit(pixels).cpu().numpy().transpose(1, 2, 0)))


def to_8bit(pixels: Tensor) -> Tensor:
    """Values in [0, 1] to uint8, rounded."""
    return (pixels.detach() * 255).round().to(torch.uint8)


def to_array(picture: Image.Image) -> NDArray[np.uint8]:
    """RGB to (3, h, w)."""
    return np.ascontiguousarray(np.asarray(picture.convert("RGB")).transpose(2, 0, 1))


def write_picture(path: Path, picture: Image.Image, *, compress_level: int = 6) -> None:
    """Write a PNG that replaces its predecessor at once."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", compress_level=compress_level)
    write_atomically(path, buffer.getvalue())


def read_picture(path: Path) -> Image.Image:
    """Read a PNG of a run.

    Raises:
        RunError: it is not there, or damaged.
    """
    try:
        return decode(path.read_bytes()).frames[0].image
    except (OSError, ImageError) as error:
        raise RunError(f"{path} is not there or damaged: {error}") from error


def _hashed(id: str, name: str) -> str:
    digest = hashlib.sha256(id.encode("utf8", "surrogatepass")).hexdigest()[:8]
    return f"{name}-{digest}" if name else digest


def _with_end(path: Path, end: str) -> Path:
    return path.with_name(path.name + end)
