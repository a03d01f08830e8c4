"""Embeddings of many image files, encoded once and kept in parts, so that a killed job goes on where it was.

A part is used again only for the same encoder, by its fingerprint, and files of the same names, sizes and times.
Knows no benchmark.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from offline.data.files import read_image_file
from offline.errors import DataError, OfflineError
from offline.runs import write_atomically
from perception.encoder import Encoder
from perception.encoders.tower import TowerEncoder
from perception.preprocess import to_pixels

PART = 256
BATCH = 32


@dataclass(frozen=True, eq=False)
class EncodedFiles:
    """Embeddings of the files that can be read.

    Attributes:
        embeddings: (k, d) on the CPU.
        rows: (k,) int64, which of the files.
        problems: why the others cannot be read.
        sha256: over the pixels.
    """

    embeddings: Tensor
    rows: NDArray[np.int64]
    problems: tuple[str, ...]
    sha256: str


@dataclass(frozen=True)
class FileEncoder:
    """How files are encoded, and where parts are kept.

    Attributes:
        encoder: of the images.
        cache: folder of the parts; None keeps nothing.
        features: un-normalised, for encoders that compare by distance.
        skip_unreadable: leave out what cannot be read, in place of ending.
    """

    encoder: Encoder
    cache: Path | None = None
    features: bool = False
    skip_unreadable: bool = False

    def encode(self, files: Sequence[Path], show: Callable[[int, int], None] | None = None) -> EncodedFiles:
        """Encode files, or read the parts that are there.

        Args:
            files: of images.
            show: is told how many of how many are done.

        Raises:
            DataMissing, DataError: a file cannot be read, or none can.
            NonFiniteEmbedding: an image has no embedding.
        """
        parts: list[_Part] = []
        for start in range(0, len(files), PART):
            parts.append(self._part(start, files[start : start + PART]))
            if show is not None:
                show(min(start + PART, len(files)), len(files))
        if not any(len(part.embeddings) for part in parts):
            reasons = [problem for part in parts for problem in part.problems][:1]
            raise DataError("images", f"none of {len(files)} can be read: {''.join(reasons)}")
        return EncodedFiles(
            torch.cat([part.embeddings for part in parts]),
            np.concatenate([part.rows.numpy() for part in parts]),
            tuple(problem for part in parts for problem in part.problems),
            hashlib.sha256("".join(part.sha256 for part in parts).encode()).hexdigest(),
        )

    def _part(self, start: int, files: Sequence[Path]) -> "_Part":
        if self.cache is None:
            return self._encoded(start, files)
        how = f"{self.encoder.fingerprint} {self.features} {self.skip_unreadable}"
        stem = hashlib.sha256(how.encode()).hexdigest()[:16]
        path = self.cache / f"{stem}-{start // PART:05d}.safetensors"
        identity = hashlib.sha256(json.dumps([how, *map(_stamp, files)]).encode()).hexdigest()
        part = _Part.load(path, identity)
        if part is None:
            part = self._encoded(start, files)
            self.cache.mkdir(parents=True, exist_ok=True)
            write_atomically(path, part.as_bytes(identity))
        return part

    def _encoded(self, start: int, files: Sequence[Path]) -> "_Part":
        images, rows, problems = [], [], []
        for row, file in enumerate(files, start):
            try:
                images.append(self.encoder.preprocess.apply(read_image_file(file)))
                rows.append(row)
            except OfflineError as error:
                if not self.skip_unreadable:
                    raise
                problems.append(str(error))
        digest = hashlib.sha256(b"".join(np.ascontiguousarray(image).tobytes() for image in images)).hexdigest()
        embeddings = [self._embeddings(images[i : i + BATCH]) for i in range(0, len(images), BATCH)]
        together = torch.cat(embeddings) if embeddings else torch.zeros(0, self.encoder.dim)
        return _Part(together, torch.tensor(rows, dtype=torch.int64), tuple(problems), digest)

    def _embeddings(self, images: Sequence[NDArray[np.uint8]]) -> Tensor:
        pixels = to_pixels(images)
        with torch.no_grad():
            if self.features and isinstance(self.encoder, TowerEncoder):
                return self.encoder.features(pixels).cpu()
            return self.encoder.encode(pixels).cpu()


@dataclass(frozen=True, eq=False)
class _Part:
    """See `EncodedFiles`."""

    embeddings: Tensor
    rows: Tensor
    problems: tuple[str, ...]
    sha256: str

    @classmethod
    def load(cls, path: Path, identity: str) -> "_Part | None":
        """The part of that identity; None where there is none, or it is damaged."""
        try:
            with safe_open(path, framework="pt") as file:
                state = json.loads((file.metadata() or {})["state"])
                if state["identity"] != identity:
                    return None
                tensors = file.get_tensor("embeddings"), file.get_tensor("rows")
                return cls(*tensors, tuple(state["problems"]), state["sha256"])
        except (OSError, SafetensorError, KeyError, ValueError, TypeError):
            return None

    def as_bytes(self, identity: str) -> bytes:
        """As a file."""
        state = json.dumps({"identity": identity, "problems": self.problems, "sha256": self.sha256})
        tensors = {"embeddings": self.embeddings.contiguous(), "rows": self.rows}
        return save(tensors, {"state": state})


def _stamp(file: Path) -> list[str | int]:
    """What changes where a file does: name, size and time; of a missing one the name."""
    try:
        status = file.stat()
    except OSError:
        return [file.name]
    return [file.name, status.st_size, status.st_mtime_ns]
