"""Test-time counterattacks (TTC, methods 7): an encoder that perturbs what it is given before it encodes it.

An attacked image tends to lie where noise hardly moves its embedding. Such an image is pushed away from the embedding
that it has, by a few steps up the gradient; any other image gets noise alone. This is a mitigation and no guarantee:
an attacker who knows of it goes through it (docs/counterattack.md has figures).

Owns the counterattack and its reproducible noise. Knows nothing of pools, requests or attackers.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from perception.encoder import Encoder, Precision, unit_embeddings
from perception.errors import CheckpointError

MIN_SEED_BYTES = 16
_PERSON = b"hardlook-ttc"  # keeps these hashes apart from any others under the same seed


@runtime_checkable
class Features(Protocol):
    """As much of an encoder as a counterattack needs."""

    def features(self, pixels: Tensor) -> Tensor:
        """(b, 3, h, w) in [0, 1] -> (b, d) float32, not normalised, differentiable."""


@runtime_checkable
class FeatureEncoder(Encoder, Features, Protocol):
    """An Encoder that also gives its embeddings before normalisation, as those of `perception.load_encoder` do."""

    @property
    def precision(self) -> Precision:
        """Of weights and activations."""


@dataclass(frozen=True)
class CounterattackSettings:
    """The parameters of methods 7, by default the published ones.

    Attributes:
        eps: radius e of the linf ball in which image and counterattack stay together, in [0, 1] pixel units.
        steps: N, of the counterattack.
        step_size: a, in [0, 1] pixel units.
        beta: how much the later steps weigh in the mean over all of them.
        threshold: of tau; an image whose tau reaches it gets noise alone. 0 never counterattacks.

    Raises:
        ValueError: a value is impossible; names it.
    """

    eps: float = 4 / 255
    steps: int = 2
    step_size: float = 1 / 255
    beta: float = 2.0
    threshold: float = 0.2

    def __post_init__(self) -> None:
        for name in ("eps", "step_size"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in (0, 1], in pixel units of [0, 1], got {getattr(self, name)}")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps must be a whole number of at least 1, got {self.steps!r}")
        for name in ("beta", "threshold"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} must be finite and not negative, got {getattr(self, name)}")

    @property
    def weights(self) -> tuple[float, ...]:
        """`w_i = e^(beta i) / sum_j e^(beta j)` of the perturbations delta_0 ... delta_N."""
        powers = [math.exp(self.beta * (i - self.steps)) for i in range(self.steps + 1)]  # the largest is 1
        return tuple(power / math.fsum(powers) for power in powers)


@dataclass(frozen=True, eq=False)
class Defended:
    """What became of a batch.

    Attributes:
        pixels: (b, 3, h, w) in [0, 1], to be encoded in place of the images.
        clean: (b, d) f(x), the features of the images themselves, without a gradient.
        tau: (b,) `|f(x + delta_0) - f(x)| / |f(x)|`.
        countered: (b,) bool, tau below the threshold: counterattacked; the others carry noise alone.
    """

    pixels: Tensor
    clean: Tensor
    tau: Tensor
    countered: Tensor


def counterattack(
    encoder: Features,
    pixels: Tensor,
    noise: Tensor,
    settings: CounterattackSettings,
    original: Features | None = None,
) -> Defended:
    """Steps 1 to 5 of methods 7; no gradient flows back through it, whatever the caller's mode.

    Args:
        encoder: f, the deployed one.
        pixels: x, (b, 3, h, w) in [0, 1].
        noise: (b, 3, h, w) in [-eps, eps], delta_0 before it is clamped to the image's box.
        settings: see there.
        original: computes tau in place of `encoder`: where that was fine-tuned, the encoder that it was made from.
    """
    # The service asks in inference mode, in which nothing has a gradient; a clone made outside of it may have one.
    with torch.inference_mode(False), torch.enable_grad():
        x, drawn = pixels.clone().detach(), noise.clone().detach()
        start = (x + drawn).clamp(0, 1) - x
        with torch.no_grad():
            anchors = encoder.features(x)
        delta, moved = start.requires_grad_(True), None
        if original is None:
            moved = encoder.features(x + delta)
            tau = _tau(moved.detach(), anchors)
        else:
            with torch.no_grad():
                tau = _tau(original.features(x + start), original.features(x))
        countered = tau < settings.threshold
        rows = torch.nonzero(countered).flatten().to(x.device)
        found = (x + start.detach()).clamp(0, 1)
        if len(rows):
            found[rows] = _countered(encoder, x, delta, moved, anchors, rows, settings)
    return Defended(found, anchors, tau, countered)


def _tau(moved: Tensor, anchors: Tensor) -> Tensor:
    tau: Tensor = (moved - anchors).norm(dim=1) / anchors.norm(dim=1)
    return tau


def _countered(
    encoder: Features,
    x: Tensor,
    start: Tensor,
    moved: Tensor | None,
    anchors: Tensor,
    rows: Tensor,
    settings: CounterattackSettings,
) -> Tensor:
    """The images `rows` after the counterattack; `moved` are the features at the start, where they are known."""
    targets, weights = anchors[rows.to(anchors.device)], settings.weights
    gradient: Tensor | None = None
    if moved is not None:
        gradient = torch.autograd.grad((moved - anchors).square().sum(), start)[0][rows]
    x, delta = x[rows], start.detach()[rows]
    total = weights[0] * delta
    for weight in weights[1:]:
        if gradient is None:
            at = delta.requires_grad_(True)
            distance = (encoder.features(x + at) - targets).square().sum()
            gradient = torch.autograd.grad(distance, at)[0]
        delta = (delta.detach() + settings.step_size * gradient.sign()).clamp(-settings.eps, settings.eps)
        delta, gradient = (x + delta).clamp(0, 1) - x, None
        total = total + weight * delta
    return (x + total).clamp(0, 1)


class Counterattack:
    """An encoder behind the counterattack, with the same embedding space; see the module.

    The noise of an image follows from the seed and the image's pixels: equal images have equal embeddings, whatever
    travels with them. It must not be known to attackers, since who knows the noise can prepare for it.

    Pools are built by the encoder itself, so that `fingerprint` is its; `defense` says what else decides an embedding.

    Attributes:
        encoder: the deployed one, without the defence.
        original, settings, together: as given.
        defense: 'ttc-' and a hash of settings, original and seed: equal ones under one fingerprint give equal
            embeddings, so that keys of caches need both. It tells nobody a seed that cannot be guessed.
        name, dim, fingerprint, preprocess, precision, device: those of the encoder.
        lipschitz: None: a bound that was proven of the encoder does not hold of this.
    """

    lipschitz: None = None

    def __init__(
        self,
        encoder: FeatureEncoder,
        settings: CounterattackSettings | None = None,
        *,
        seed: bytes,
        original: FeatureEncoder | None = None,
        together: int = 1,
    ) -> None:
        """Put an encoder behind the counterattack.

        Args:
            encoder: to be deployed.
            settings: the published ones by default.
            seed: of the noise, secret; at least `MIN_SEED_BYTES` bytes.
            original: see `counterattack`.
            together: images that are counterattacked at a time, at least 1. One at a time, an answer does not depend
                on what travels with it; several together take less time on a GPU, but a gradient that is nearly zero
                may then change its sign with its company.

        Raises:
            ValueError: the seed is too short, or `together` impossible.
            CheckpointError: `original` takes images of another size than `encoder`.
        """
        if len(seed) < MIN_SEED_BYTES:
            raise ValueError(f"the seed of the noise must have at least {MIN_SEED_BYTES} bytes, got {len(seed)}")
        if together < 1:
            raise ValueError(f"together must be at least 1, got {together}")
        self.encoder, self.original, self.settings = encoder, original, settings or CounterattackSettings()
        self.together = together
        self.name, self.dim, self.fingerprint = encoder.name, encoder.dim, encoder.fingerprint
        self.precision, self.preprocess = encoder.precision, encoder.preprocess
        self.device = torch.device(getattr(encoder, "device", "cpu"))
        if original is not None and original.preprocess.size_px != encoder.preprocess.size_px:
            raise CheckpointError(
                f"the original encoder {original.name} takes images of {original.preprocess.size_px} px, "
                f"{encoder.name} of {encoder.preprocess.size_px} px: both must see the same pixels"
            )
        self._key = hashlib.blake2b(seed, person=_PERSON).digest()
        what = {**asdict(self.settings), "original": "" if original is None else original.fingerprint}
        said = hashlib.blake2b(json.dumps(what, sort_keys=True).encode(), key=self._key, person=b"hardlook-version")
        self.defense = f"ttc-{said.hexdigest()[:12]}"

    @property
    def text(self) -> object:
        """The encoder's text tower, which is not defended; None or its errors where it has none."""
        return getattr(self.encoder, "text", None)

    def noise(self, pixels: Tensor) -> Tensor:
        """Uniform noise in [-eps, eps) of the shape of `pixels` (b, 3, h, w), of each image by its seed and values."""
        rows = []
        for image in pixels.detach().float().cpu().numpy().astype("<f4"):
            digest = hashlib.blake2b(image.tobytes(), key=self._key, person=_PERSON, digest_size=16).digest()
            # A counter-based generator whose raw numbers are the same in every version of numpy.
            raw = np.random.Philox(key=int.from_bytes(digest, "big")).random_raw(image.size)
            rows.append((raw >> np.uint64(40)).astype(np.float32).reshape(image.shape) * np.float32(2**-23) - 1)
        return self.settings.eps * torch.from_numpy(np.stack(rows)).to(pixels.device)

    def defend(self, pixels: Tensor) -> Defended:
        """The images (b, 3, h, w) in [0, 1] that are encoded in place of the given ones, and why."""
        at = pixels.to(self.device)
        parts = [
            counterattack(self.encoder, part, self.noise(part), self.settings, self.original)
            for part in at.split(self.together)
        ]
        return Defended(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Defended)))

    def features(self, pixels: Tensor) -> Tensor:
        """Embeddings before normalisation: (b, 3, h, w) in [0, 1] -> (b, d) float32.

        Where gradients are asked for, the perturbation counts as a constant.
        """
        found = self.defend(pixels).pixels
        if torch.is_grad_enabled():
            found = found + (pixels - pixels.detach()).to(found.device)
        return self.encoder.features(found)

    def encode(self, pixels: Tensor) -> Tensor:
        """See `perception.encoder.Encoder.encode`."""
        return unit_embeddings(self.features(pixels))

    def encode_both(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """As `encode`, and what the encoder makes of the images themselves, which costs nothing more; no gradients."""
        with torch.no_grad():
            found = self.defend(pixels)
            return unit_embeddings(self.encoder.features(found.pixels)), unit_embeddings(found.clean)
