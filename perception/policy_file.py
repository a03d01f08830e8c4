"""Calibrated policies: a decision policy, the figures of the audit that it was chosen by, and their file format.

One JSON file: the format's name, the content, and a sha256 over the content. It is written in one canonical form, so
that a change of a single byte shows.
"""

import hashlib
import json
import math
import os
import re
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from perception.errors import FingerprintMismatch, PolicyError
from perception.intervals import wilson_interval
from perception.verdict import DecisionPolicy, VerdictLabel

_FORMAT = "hardlook-policy-1"
_SHA256 = re.compile(r"[0-9a-f]{64}")
Norm = Literal["linf", "l2"]


@dataclass(frozen=True)
class Rate:
    """A share that was counted.

    Raises:
        PolicyError: nothing was counted, or more than all.
    """

    count: int
    total: int

    def __post_init__(self) -> None:
        if self.total < 1 or not 0 <= self.count <= self.total:
            raise PolicyError(f"{self.count} of {self.total} is no share")

    @property
    def value(self) -> float:
        """The share, in [0, 1]."""
        return self.count / self.total

    @property
    def interval95(self) -> tuple[float, float]:
        """Wilson's 95 % interval, in [0, 1]."""
        return wilson_interval(self.count, self.total)


@dataclass(frozen=True)
class Rates:
    """How a policy answers one version of the images, clean or attacked.

    Attributes:
        false_negative: unsafe images that it calls `safe`, of all unsafe ones.
        false_positive: safe images that it calls `unsafe`, of all safe ones.
        review_unsafe, review_safe: unsafe and safe images that it leaves to a person, of all of that label.
    """

    false_negative: Rate
    false_positive: Rate
    review_unsafe: Rate
    review_safe: Rate


@dataclass(frozen=True)
class Measured:
    """How a policy answers: images as they are, and as an attacker left them."""

    clean: Rates
    attacked: Rates


@dataclass(frozen=True)
class Targets:
    """What a policy was chosen to meet, on clean and on attacked images.

    Attributes:
        max_false_negative, max_false_positive: shares in [0, 1).
        confident: the upper end of the 95 % interval has to meet them, instead of the measured share.

    Raises:
        PolicyError: a share is out of range.
    """

    max_false_negative: float
    max_false_positive: float
    confident: bool = False

    def __post_init__(self) -> None:
        for name in ("max_false_negative", "max_false_positive"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise PolicyError(f"{name} must be in [0, 1), got {getattr(self, name)}")

    def figure(self, rate: Rate) -> float:
        """What is compared with a target: the share, or the upper end of its interval."""
        return rate.interval95[1] if self.confident else rate.value


@dataclass(frozen=True)
class FlipRate:
    """How often verdicts with such a margin flipped under one setting of an audit.

    Attributes:
        norm, eps, steps: how the images were attacked; eps in [0, 1] pixel units.
        value: the share of flipped verdicts, in [0, 1].
        interval95: its Wilson interval.
        n: verdicts that the share is of.
    """

    norm: Norm
    eps: float
    steps: int
    value: float
    interval95: tuple[float, float]
    n: int


def _require_setting(eps: float, steps: int) -> None:
    if not 0 < eps < math.inf or steps < 1:
        raise PolicyError(f"eps {eps} with {steps} steps is no attack")


@dataclass(frozen=True)
class FlipBin:
    """Verdicts of one label with margins in one range, under one setting of an audit.

    Attributes:
        norm, eps, steps: as in `FlipRate`.
        verdict: `safe` or `unsafe`, given rightly to the clean images.
        margin_from, margin_to: of the clean images, from the first up to but without the second.
        flipped: images of which the attacked version was no longer called so.
        total: images in the bin.

    Raises:
        PolicyError: these do not fit together.
    """

    norm: Norm
    eps: float
    steps: int
    verdict: VerdictLabel
    margin_from: float
    margin_to: float
    flipped: int
    total: int

    def __post_init__(self) -> None:
        _require_setting(self.eps, self.steps)
        if self.verdict is VerdictLabel.REVIEW:
            raise PolicyError("a bin is of verdicts 'safe' or 'unsafe'")
        if not -math.inf < self.margin_from < self.margin_to < math.inf:
            raise PolicyError(f"margins from {self.margin_from} to {self.margin_to} are no range")
        _ = self.rate

    @property
    def rate(self) -> Rate:
        """The share that flipped."""
        return Rate(self.flipped, self.total)

    def holds(self, label: VerdictLabel, margin: float) -> bool:
        """Whether a verdict is of this label and range."""
        return self.verdict is label and self.margin_from <= margin < self.margin_to


@dataclass(frozen=True)
class CalibratedPolicy:
    """A policy with what is known of it. Values are what was measured on the audited images, never a guarantee.

    Attributes:
        policy: as it decides.
        name: for people.
        encoder_fingerprint: of the audited encoder.
        gallery_sha256: of the audited pools; see `Gallery.sha256`.
        attacked_under: version of the policy that the attacked images were made against. Against any other, attackers
            could have done better than they did.
        norm, eps, steps: the setting that the thresholds were chosen under.
        targets: what they were chosen to meet.
        rates: on the images that they were chosen by.
        cross_validated: chosen by one half of the images and measured on the other, both ways added up; None where
            half of them were too few to choose by.
        flips: for every audited setting.

    Raises:
        PolicyError: these do not fit together.
    """

    policy: DecisionPolicy
    name: str
    encoder_fingerprint: str
    gallery_sha256: str
    attacked_under: str
    norm: Norm
    eps: float
    steps: int
    targets: Targets
    rates: Measured
    cross_validated: Measured | None
    flips: tuple[FlipBin, ...]

    def __post_init__(self) -> None:
        _require_setting(self.eps, self.steps)
        if not (self.name and self.encoder_fingerprint and self.attacked_under):
            raise PolicyError("a calibrated policy needs a name, an encoder and the policy that was attacked")
        if not _SHA256.fullmatch(self.gallery_sha256):
            raise PolicyError(f"gallery_sha256 {self.gallery_sha256!r} is not 64 hex digits")

    def flip_rates(self, label: VerdictLabel, margin: float | None) -> tuple[FlipRate, ...]:
        """How often audited verdicts of this label with such a margin flipped, for each audited setting.

        Args:
            label: of the verdict.
            margin: see `Verdict.margin`.

        Returns:
            Nothing for `review`, without a margin, and where no audited image had one near it.
        """
        if margin is None:
            return ()
        return tuple(
            FlipRate(found.norm, found.eps, found.steps, found.rate.value, found.rate.interval95, found.total)
            for found in self.flips
            if found.holds(label, margin)
        )

    def require_encoder(self, fingerprint: str, artefact: str = "calibrated policy") -> None:
        """Raise FingerprintMismatch unless the policy was chosen for this encoder."""
        if fingerprint != self.encoder_fingerprint:
            raise FingerprintMismatch(artefact, fingerprint, self.encoder_fingerprint)

    @cached_property
    def sha256(self) -> str:
        """Hash over all that is in it, as in its file."""
        canonical = json.dumps(self._content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def save(self, path: Path) -> None:
        """Write to one file, atomically."""
        partial = path.with_name(path.name + ".partial")
        partial.write_bytes(self._as_bytes())
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path) -> "CalibratedPolicy":
        """Read a policy and check its hash.

        Raises:
            PolicyError: absent, damaged, of another format, or changed since it was written.
        """
        try:
            data = path.read_bytes()
            document = json.loads(data)
            if document["format"] != _FORMAT:
                raise PolicyError(f"format {document['format']!r}, expected {_FORMAT!r}")
            calibrated = _ADAPTER.validate_json(json.dumps(document["content"]), strict=True)
            if data != calibrated._as_bytes():
                raise PolicyError(
                    f"changed since it was written: its content has the sha256 {calibrated.sha256}, recorded is "
                    f"{document['sha256']}"
                )
            return calibrated
        except (PolicyError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise PolicyError(f"cannot read policy {path}: {error}") from error

    @cached_property
    def _content(self) -> dict[str, Any]:
        """All fields as loading would give them: a 0 among floats is 0.0."""
        return asdict(_ADAPTER.validate_json(json.dumps(asdict(self), allow_nan=False), strict=True))

    def _as_bytes(self) -> bytes:
        """The one form of its file."""
        document = {"format": _FORMAT, "sha256": self.sha256, "content": self._content}
        return (json.dumps(document, indent=1, sort_keys=True) + "\n").encode()


_ADAPTER = TypeAdapter(CalibratedPolicy)
