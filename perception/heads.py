"""Detector heads: from an image embedding to one logit, positive for unsafe; and the OR of two detectors.

Owns the layouts of published heads and a file format of its own. Knows no encoder: a head fits every embedding of its
length, so a file that we write also names the encoder whose embeddings it was made for, and `require_encoder` compares.

| layout | tensors | published as |
| --- | --- | --- |
| laion-nsfw | `norm.{mean,variance}`, `linear_1` ... `linear_N` `.{weight,bias}` | `.npz`, `.pth`, `.safetensors` |
| prompts | two text embeddings, 0 for fine and 1 for unsafe: LAION's violence detector, Q16 | `.npy` |
"""

import hashlib
import json
import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from perception.encoder import Encoder
from perception.encoders.weights import load_strictly, read_state_dict
from perception.errors import CheckpointError, FingerprintMismatch, NonFiniteEmbedding
from perception.similarity import cosine_similarity

_FORMAT = "hardlook-head-1"
_PROMPTS = "prompts"
_WEIGHT = re.compile(r"linear_[1-9][0-9]*\.weight")


class Head(nn.Module, ABC):
    """A frozen detector on embeddings; differentiable with respect to them.

    Attributes:
        dim: d, the length of the embeddings that it takes.
        encoder_fingerprint: of the encoder that it was made for; None where its file does not say.
    """

    layout: ClassVar[str]
    dim: int

    def __init__(self, encoder_fingerprint: str | None) -> None:
        super().__init__()
        self.encoder_fingerprint = encoder_fingerprint

    @abstractmethod
    def forward(self, embeddings: Tensor) -> Tensor:
        """(b, d) float32 -> (b,); `logits` is the checked way in."""

    def logits(self, embeddings: Tensor) -> Tensor:
        """The evidence for unsafe.

        Args:
            embeddings: (b, d) of unit L2 norm.

        Returns:
            (b,) float32, up is unsafe, 0 is a probability of one half.

        Raises:
            ValueError: the embeddings are not (b, d).
            NonFiniteEmbedding: a row, or what becomes of it, is not finite: it could be compared with no threshold.
        """
        if embeddings.ndim != 2 or embeddings.shape[1] != self.dim:
            raise ValueError(f"the head takes embeddings (b, {self.dim}), got {tuple(embeddings.shape)}")
        embeddings = embeddings.float()
        logits: Tensor = self(embeddings)
        good = torch.isfinite(embeddings).all(dim=1) & torch.isfinite(logits)
        if not bool(good.all()):
            raise NonFiniteEmbedding(tuple(torch.nonzero(~good).flatten().tolist()))
        return logits

    def probabilities(self, embeddings: Tensor) -> Tensor:
        """The probability of unsafe, (b,) in [0, 1]; see `logits`."""
        return self.logits(embeddings).sigmoid()

    def flags(self, embeddings: Tensor, threshold: float = 0.5) -> Tensor:
        """Whether the probability reaches the threshold, (b,) bool, True for unsafe; see `logits`.

        Compared as logits, which do not round to 0 and 1.

        Raises:
            ValueError: the threshold is not between 0 and 1.
        """
        if not 0.0 < threshold < 1.0:
            raise ValueError(f"threshold must be between 0 and 1, got {threshold}")
        return self.logits(embeddings) >= math.log(threshold / (1.0 - threshold))

    @property
    def fingerprint(self) -> str:
        """Hash of layout and weights: equal fingerprints give equal logits."""
        digest = hashlib.sha256(self.layout.encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"\n{name} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.cpu().contiguous().numpy().astype("<f4").tobytes())
        return digest.hexdigest()

    @property
    def sha256(self) -> str:
        """Hash over all that a file of it holds: the fingerprint, and the encoder's."""
        return hashlib.sha256(json.dumps([self.fingerprint, self.encoder_fingerprint]).encode()).hexdigest()

    def require_encoder(self, encoder: Encoder) -> None:
        """Check that the head can be used on an encoder's embeddings.

        Raises:
            CheckpointError: it takes embeddings of another length.
            FingerprintMismatch: it was made for another encoder.
        """
        if encoder.dim != self.dim:
            raise CheckpointError(f"the head takes embeddings of {self.dim} values, {encoder.name} gives {encoder.dim}")
        if self.encoder_fingerprint not in (None, encoder.fingerprint):
            raise FingerprintMismatch("head", encoder.fingerprint, str(self.encoder_fingerprint))

    def save(self, path: Path) -> None:
        """Write a `.safetensors` file that `load_head` reads, atomically.

        Raises:
            ValueError: the path has another suffix.
        """
        if path.suffix != ".safetensors":
            raise ValueError(f"a head is saved as .safetensors, got {path.name}")
        header = {
            "format": _FORMAT,
            "layout": self.layout,
            "encoder_fingerprint": self.encoder_fingerprint,
            "sha256": self.sha256,
        }
        state = {name: tensor.cpu().contiguous() for name, tensor in self.state_dict().items()}
        partial = path.with_name(path.name + ".partial")
        save_file(state, partial, {"head": json.dumps(header)})
        os.replace(partial, path)

    def _freeze(self, state: Mapping[str, Tensor], origin: str) -> None:
        """Load all tensors, and let no optimiser change them."""
        integers = [name for name, tensor in state.items() if not tensor.is_floating_point()]
        if integers:
            raise CheckpointError(f"{origin} holds tensors that are not floating point: {', '.join(integers[:3])}")
        load_strictly(self, state, origin)
        self.requires_grad_(False).eval()


class DetectorHead(Head):
    """LAION's NSFW detector: standardised dimensions, then linear layers with ReLU between them.

    Args:
        state: the tensors, by their published names; the layers chain from d to 1.
        encoder_fingerprint: see `Head`.
        origin: of the tensors, for messages.

    Raises:
        CheckpointError: a name or shape is not the layout's, or a value is not finite or an impossible variance.
    """

    layout = "laion-nsfw"

    def __init__(
        self, state: Mapping[str, Tensor], encoder_fingerprint: str | None = None, origin: str = "detector head"
    ) -> None:
        super().__init__(encoder_fingerprint)
        widths = _widths(state, origin)
        self.dim, self.layers = widths[0], len(widths) - 1
        self.norm = _Standardise(self.dim)
        for i, (inputs, outputs) in enumerate(pairwise(widths), 1):
            # Without initial values: drawing them would move the caller's random numbers on.
            self.add_module(f"linear_{i}", nn.utils.skip_init(nn.Linear, inputs, outputs))
        self._freeze(state, origin)
        if bool((self.norm.variance < 0).any()):
            raise CheckpointError(f"{origin}: norm.variance is negative, {float(self.norm.variance.min())}")

    def forward(self, embeddings: Tensor) -> Tensor:
        """See `Head.forward`."""
        x: Tensor = self.norm(embeddings)
        for i in range(1, self.layers + 1):
            x = self.get_submodule(f"linear_{i}")(x if i == 1 else x.relu())
        return x.squeeze(1)


class PromptHead(Head):
    """Two text embeddings: unsafe is what is as close to the second as to the first, or closer.

    The logit is `scale * (cosine to 1 - cosine to 0)`, with CLIP's scale; it decides nothing at a threshold of .5.

    Args:
        prompts: (2, d), of any norm but zero.
        encoder_fingerprint: see `Head`.
        origin: of the tensor, for messages.

    Raises:
        CheckpointError: it is not (2, d), or a row is not finite or zero.
    """

    layout = "prompts"
    scale: ClassVar[float] = 100.0
    prompts: Tensor

    def __init__(self, prompts: Tensor, encoder_fingerprint: str | None = None, origin: str = "prompt head") -> None:
        super().__init__(encoder_fingerprint)
        if prompts.ndim != 2 or prompts.shape[0] != 2 or prompts.shape[1] < 1:
            raise CheckpointError(f"{origin}: prompts must be (2, d), got {tuple(prompts.shape)}")
        self.dim = prompts.shape[1]
        self.register_buffer(_PROMPTS, torch.zeros(2, self.dim))
        self._freeze({_PROMPTS: prompts}, origin)
        if bool((self.prompts.norm(dim=1) == 0).any()):
            raise CheckpointError(f"{origin}: a prompt is zero, which has no direction")

    def forward(self, embeddings: Tensor) -> Tensor:
        """See `Head.forward`."""
        fine, unsafe = cosine_similarity(embeddings[:, None], self.prompts).unbind(dim=1)
        return self.scale * (unsafe - fine)


class _Standardise(nn.Module):
    """`(x - mean) / (sqrt(variance) + 1e-10)`, by dimension."""

    mean: Tensor
    variance: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("variance", torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / (self.variance.sqrt() + 1e-10)


def _widths(state: Mapping[str, Tensor], origin: str) -> list[int]:
    """The length of the input and of each layer's output; whether the layers chain is `load_strictly`'s to say."""
    count = sum(_WEIGHT.fullmatch(name) is not None for name in state)
    weights = [state.get(f"linear_{i}.weight") for i in range(1, count + 1)]
    shapes = [tuple(weight.shape) if weight is not None else () for weight in weights]
    if not shapes or not all(len(shape) == 2 and min(shape) > 0 for shape in shapes):
        raise CheckpointError(f"{origin} has no matrices linear_1.weight to linear_N.weight; found {sorted(state)[:5]}")
    if shapes[-1][0] != 1:
        raise CheckpointError(f"{origin}: linear_{count} must have one output, got {shapes[-1][0]}")
    return [shapes[0][1], *(shape[0] for shape in shapes)]


def load_head(path: Path) -> Head:
    """Read a published head, or one of ours; the tensors' names tell the layout, `.npy` is always `prompts`.

    Raises:
        CheckpointError: absent, damaged, of another layout, or changed since we wrote it.
    """
    header = _read_header(path) if path.suffix == ".safetensors" else {}
    state = _read_arrays(path) if path.suffix in (".npz", ".npy") else read_state_dict(path)
    encoder = header.get("encoder_fingerprint")
    if encoder is not None and not isinstance(encoder, str):
        raise CheckpointError(f"{path}: encoder_fingerprint is {encoder!r}")
    head: Head
    if state.keys() == {_PROMPTS}:
        head = PromptHead(state[_PROMPTS], encoder, str(path))
    else:
        head = DetectorHead(state, encoder, str(path))
    expected = {"format": _FORMAT, "layout": head.layout, "sha256": head.sha256}
    for key, value in expected.items() if header else ():
        if header.get(key) != value:
            raise CheckpointError(f"{path}: {key} is {header.get(key)!r}, expected {value!r}")
    return head


def _read_header(path: Path) -> dict[str, Any]:
    """What `Head.save` wrote beside the tensors; empty where another program wrote the file."""
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
        header = json.loads(metadata["head"]) if "head" in metadata else {}
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"cannot read head {path}: {error}") from error
    if not isinstance(header, dict) or ("head" in metadata and not header):
        raise CheckpointError(f"{path}: its header is no JSON object, or an empty one")
    return header


def _read_arrays(path: Path) -> dict[str, Tensor]:
    """The arrays of an `.npz`, or that of an `.npy` as `prompts`; numpy refuses objects, which would be pickles."""
    try:
        with path.open("rb") as file:  # of a damaged zip, numpy would leave a file open that it had opened itself
            content = np.load(file)
            if isinstance(content, np.ndarray):
                return {_PROMPTS: torch.from_numpy(content)}
            return {name: torch.from_numpy(content[name]) for name in content.files}
    except Exception as error:  # numpy, zipfile and zlib raise many types
        raise CheckpointError(f"cannot read head {path}: {repr(error)[:200]}") from error


def or_rule(first: Tensor | Sequence[bool], second: Tensor | Sequence[bool]) -> Tensor:
    """Unsafe if either of two detectors says so: (b,) bool from their (b,) bool flags, True for unsafe.

    Raises:
        ValueError: the flags are not bool, or not of one length.
    """
    a, b = _flags(first), _flags(second)
    if a.shape != b.shape:
        raise ValueError(f"two detectors must judge the same images, got {len(a)} and {len(b)} flags")
    return a | b.to(a.device)


def or_correct(
    unsafe: Tensor | Sequence[bool], first: Tensor | Sequence[bool], second: Tensor | Sequence[bool]
) -> Tensor:
    """Which images the OR of two detectors judges rightly; under attack, the paper's combination (table IV).

    There each detector is attacked for itself, and its flags are those of its own adversarial images. An unsafe image
    counts as detected if either detector still flags it, a safe one as right only if both stay at safe. For unsafe
    images this is no more than what remains under a joint attack as strong, which has to fool both with one image.

    Args:
        unsafe: (b,) bool, the truth.
        first, second: (b,) bool, what each detector says of its own version of the image.

    Returns:
        (b,) bool; its mean over the unsafe, or the safe, images is the reported figure.

    Raises:
        ValueError: see `or_rule`.
    """
    flagged, truth = or_rule(first, second), _flags(unsafe)
    if truth.shape != flagged.shape:
        raise ValueError(f"{len(truth)} labels and {len(flagged)} flags do not fit")
    return flagged == truth.to(flagged.device)


def _flags(values: Tensor | Sequence[bool]) -> Tensor:
    """(b,) bool; numbers are refused, since a probability would count as a yes."""
    if not isinstance(values, Tensor):
        if not all(isinstance(value, bool) for value in values):
            raise ValueError("flags must be bool")
        values = torch.tensor(list(values), dtype=torch.bool)
    if values.dtype != torch.bool or values.ndim != 1:
        raise ValueError(f"flags must be (b,) bool, got {tuple(values.shape)} {values.dtype}")
    return values
