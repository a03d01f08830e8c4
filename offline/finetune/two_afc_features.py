"""Features of triplets under a frozen encoder, computed once and kept in a run directory.

Owns the cache's files, each of which says which encoder, preprocessing and triplets it is of.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from offline.errors import RunError
from offline.finetune.two_afc_batches import Part, TripletImages, triplets_sha256
from perception.encoders.tower import TowerEncoder
from perception.errors import NonFiniteEmbedding

_FILE_TRIPLETS = 1024  # a kill costs no more than these
_NAME = "features"


class FeatureCache:
    """Features (n, 3, d) of one split, in files of 1,024 triplets."""

    def __init__(self, folder: Path, split: str, encoder: TowerEncoder, images: TripletImages, chunk: int) -> None:
        """Bind the files to what they are of.

        Args:
            folder: made where it does not exist.
            chunk: triplets that are encoded at a time.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._split, self._encoder, self._images, self._chunk = folder, split, encoder, images, chunk
        identity = [encoder.fingerprint, images.preprocess.as_dict(), triplets_sha256(images.triplets)]
        self.fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def fill(self, workers: int = 0) -> Iterator[int]:
        """Compute what is missing; yields the number of triplets done, after each file.

        Raises:
            RunError: an image cannot be read, or a file is of another encoder or other triplets.
            NonFiniteEmbedding: an image has no embedding.
        """
        for start in range(0, len(self._images), _FILE_TRIPLETS):
            if not self._path(start).exists():
                rows = self._images.triplets[start : start + _FILE_TRIPLETS]
                part = Part(TripletImages(rows, self._images.preprocess), None, self._chunk)
                steps = range(-(-len(rows) // self._chunk))
                self._save(start, torch.cat([self._encode(batch.images) for batch in part.stream(steps, workers)]))
            self._load(start)
            yield min(start + _FILE_TRIPLETS, len(self._images))

    def load(self) -> Tensor:
        """All of them: (n, 3, d) float32.

        Raises:
            RunError: a file is absent, damaged, or of another encoder or other triplets.
        """
        return torch.cat([self._load(start) for start in range(0, len(self._images), _FILE_TRIPLETS)])

    @torch.inference_mode()
    def _encode(self, pixels: Tensor) -> Tensor:
        features: Tensor = self._encoder.features(pixels.flatten(0, 1).to(self._encoder.device).float().div_(255.0))
        bad = torch.nonzero(~torch.isfinite(features).all(dim=1)).flatten().tolist()
        if bad:
            raise NonFiniteEmbedding(tuple(bad))
        return features.cpu().reshape(-1, 3, features.shape[1])

    def _path(self, start: int) -> Path:
        return self._folder / f"{_NAME}-{self._split}-{start // _FILE_TRIPLETS:04d}.safetensors"

    def _save(self, start: int, features: Tensor) -> None:
        partial = self._path(start).with_suffix(".partial")
        save_file({_NAME: features.contiguous()}, partial, metadata={"fingerprint": self.fingerprint})
        partial.replace(self._path(start))

    def _load(self, start: int) -> Tensor:
        path = self._path(start)
        try:
            with safe_open(path, framework="pt") as file:
                found = (file.metadata() or {}).get("fingerprint")
                if found != self.fingerprint:
                    raise RunError(
                        f"{path} holds features of {found}, expected {self.fingerprint}: of another encoder, other "
                        "preprocessing or other triplets; remove it, or choose another --run folder"
                    )
                features: Tensor = file.get_tensor(_NAME)
        except (OSError, SafetensorError) as error:
            raise RunError(f"damaged features {path}: {error}") from error
        rows = min(_FILE_TRIPLETS, len(self._images) - start)
        if features.shape[:2] != (rows, 3) or features.ndim != 3:
            raise RunError(f"{path} holds {tuple(features.shape)}, expected ({rows}, 3, {self._encoder.dim})")
        return features
