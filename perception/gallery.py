"""Gallery: a frozen set of embeddings with ids and labels, and its file format.

One safetensors file: tensor `embeddings` (n, d) float32, and in the header a JSON object with ids, labels, encoder
fingerprint and a sha256 over all of it. No pixels, no pickle.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from perception.errors import FingerprintMismatch, GalleryError

_FORMAT = "hardlook-gallery-1"


@dataclass(frozen=True, eq=False)
class Gallery:
    """Embeddings to compare with.

    Attributes:
        ids: n unique identifiers.
        labels: n labels (pool names for moderation pools).
        embeddings: (n, d) float32, unit L2 norm.
        encoder_fingerprint: of the encoder that made the embeddings.
    """

    ids: tuple[str, ...]
    labels: tuple[str, ...]
    embeddings: NDArray[np.float32]
    encoder_fingerprint: str

    def __post_init__(self) -> None:
        n = len(self.ids)
        if self.embeddings.ndim != 2 or self.embeddings.dtype != np.float32:
            raise GalleryError(
                f"embeddings must be (n, d) float32, got {self.embeddings.shape} {self.embeddings.dtype}"
            )
        if not n == len(self.labels) == len(self.embeddings):
            raise GalleryError(f"{n} ids, {len(self.labels)} labels and {len(self.embeddings)} embeddings do not fit")
        if len(set(self.ids)) != n:
            raise GalleryError("ids are not unique")
        norms = np.linalg.norm(self.embeddings, axis=1)
        if not np.all(np.abs(norms - 1.0) < 1e-3):  # also catches NaN
            raise GalleryError("embeddings must be finite and of unit L2 norm")
        self.embeddings.setflags(write=False)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def sha256(self) -> str:
        """Hash over ids, labels, fingerprint and embedding bytes: equal hashes are equal galleries."""
        digest = hashlib.sha256(json.dumps([self.ids, self.labels, self.encoder_fingerprint]).encode())
        digest.update(np.ascontiguousarray(self.embeddings, dtype="<f4").tobytes())
        return digest.hexdigest()

    def subset(self, label: str) -> "Gallery":
        """The part that carries one label."""
        rows = [i for i, found in enumerate(self.labels) if found == label]
        return Gallery(
            tuple(self.ids[i] for i in rows), (label,) * len(rows), self.embeddings[rows], self.encoder_fingerprint
        )

    def require_encoder(self, fingerprint: str, artefact: str = "gallery") -> None:
        """Raise FingerprintMismatch unless the gallery was made by this encoder."""
        if fingerprint != self.encoder_fingerprint:
            raise FingerprintMismatch(artefact, fingerprint, self.encoder_fingerprint)

    def save(self, path: Path) -> None:
        """Write to one file, atomically."""
        header = {
            "format": _FORMAT,
            "ids": self.ids,
            "labels": self.labels,
            "encoder_fingerprint": self.encoder_fingerprint,
            "sha256": self.sha256,
        }
        partial = path.with_name(path.name + ".partial")
        save_file({"embeddings": np.ascontiguousarray(self.embeddings)}, partial, {"gallery": json.dumps(header)})
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path) -> "Gallery":
        """Read a gallery and check its hash.

        Raises:
            GalleryError: absent, damaged, of another format, or changed since it was written.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                header = json.loads((file.metadata() or {})["gallery"])
                embeddings = file.get_tensor("embeddings")
            if header["format"] != _FORMAT:
                raise GalleryError(f"{path}: format {header['format']!r}, expected {_FORMAT!r}")
            gallery = cls(tuple(header["ids"]), tuple(header["labels"]), embeddings, header["encoder_fingerprint"])
            recorded = header["sha256"]
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise GalleryError(f"cannot read gallery {path}: {error}") from error
        if gallery.sha256 != recorded:
            raise GalleryError(f"{path}: sha256 {gallery.sha256} differs from the recorded {recorded}")
        return gallery
