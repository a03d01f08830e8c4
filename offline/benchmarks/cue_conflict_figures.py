"""The figures of cue-conflict images: how often shape decides, and how far machines and people agree.

Owns the formulas; knows no images and no encoders.

| figure | of an encoder | of people |
| --- | --- | --- |
| shape_bias | shape / (shape + texture) decisions (Geirhos et al. 2019) | the same, of all answers |
| cue_share | decisions that are either cue | the same |
| shape_accuracy, texture_accuracy | decisions that are that cue | the same |
| human_agreement | mean share of an image's people who gave its answer | two different people of an image |
| majority_agreement | agreement with the most frequent answer | one of the people and the others' |
| error_consistency | Cohen's kappa of being right (the shape), with one of the people | of two different people |

`error_consistency` is that of Geirhos et al. 2020, `k = (c_obs - c_exp) / (1 - c_exp)` with
`c_exp = p q + (1 - p) (1 - q)`, and with a person drawn anew for each image: the table does not say which answers are
one person's. Unanswered trials count among the people and agree with nothing. An image without a sole most frequent
answer has no majority.

Intervals are Wilson's for what an encoder's decisions count, and else of the bootstrap over images.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offline.benchmarks.bootstrap import Draws, Estimate, Figure, Floats, divided, ratio
from offline.errors import DataError

FIGURES = (
    "shape_bias", "cue_share", "shape_accuracy", "texture_accuracy", "human_agreement", "majority_agreement",
    "error_consistency",
)  # fmt: skip

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Answers:
    """What people say of n images with c classes.

    Attributes:
        shape, texture: (n,) classes of the two cues.
        counts: (n, c) people by class.
        unanswered: (n,) people who said nothing.
    """

    shape: Integers
    texture: Integers
    counts: Integers
    unanswered: Integers

    def __post_init__(self) -> None:
        """Check that the parts fit.

        Raises:
            DataError: they do not, or an image has one class for both cues or nobody's answer.
        """
        n = len(self.shape)
        if self.counts.ndim != 2 or not n or {len(x) for x in (self.texture, self.counts, self.unanswered)} != {n}:
            raise DataError("cue conflict", f"{n} shapes do not fit counts {self.counts.shape}")
        if bool((self.shape == self.texture).any()) or int(self.people.min()) < 1:
            raise DataError("cue conflict", "an image has one class for both cues, or nobody's answer")

    @property
    def people(self) -> Integers:
        """(n,) how many people saw each image."""
        return np.asarray(self.counts.sum(axis=1) + self.unanswered)

    def of(self, classes: Integers) -> Floats:
        """(n,) how many people gave the answer `classes[i]` of image i."""
        return self.counts[np.arange(len(classes)), classes].astype(np.float64)


@dataclass(frozen=True)
class Observed:
    """One observer's figures.

    Attributes:
        observer: 'humans' or an encoder's name.
        figures: by the names of `FIGURES`.
        by_class: the shape bias of the images whose shape is that class.
        by_shape, by_texture: decisions (of people: answers) that the shape bias is made of.
        values: each figure on all resamples, for paired differences.
    """

    observer: str
    figures: Mapping[str, Estimate]
    by_class: Mapping[str, Estimate]
    by_shape: int
    by_texture: int
    values: Mapping[str, Floats] = field(repr=False, compare=False)

    def minus(self, other: "Observed") -> dict[str, Estimate]:
        """By figure, the difference to another observer of the same images, its interval from paired resamples."""
        return {name: Estimate.of(self.values[name] - other.values[name]) for name in FIGURES}

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "observer": self.observer,
            "decided_by_shape": self.by_shape,
            "decided_by_texture": self.by_texture,
            **{name: estimate.as_dict() for name, estimate in self.figures.items()},
            "shape_bias_by_class": {name: estimate.as_dict() for name, estimate in self.by_class.items()},
        }


def observe_machine(
    name: str, decisions: Sequence[str], answers: Answers, draws: Draws, classes: Sequence[str]
) -> Observed:
    """The figures of an encoder that decided `decisions[i]`, one of `classes`, on image i.

    Raises:
        DataError: there is not one decision an image.
    """
    if len(decisions) != len(answers.shape):
        raise DataError("cue conflict", f"{len(decisions)} decisions on {len(answers.shape)} images")
    decided = np.array([classes.index(decision) for decision in decisions])
    shape, texture = (decided == answers.shape).astype(float), (decided == answers.texture).astype(float)
    majority = _sole_majority(answers.counts)
    right = answers.of(answers.shape) / answers.people
    every = np.ones(len(decided))
    agreement: dict[str, Figure] = {
        "human_agreement": ratio(answers.of(decided) / answers.people, every),
        "majority_agreement": ratio(decided == majority, majority >= 0),
        "error_consistency": _kappa(shape * right + (1 - shape) * (1 - right), shape, right, every),
    }
    observed = _observed(name, agreement, (shape, texture, every), answers, draws, classes)
    by_shape, by_texture, n = int(shape.sum()), int(texture.sum()), len(decided)
    counted = {
        "shape_bias": Estimate.of_count(by_shape, by_shape + by_texture),
        "cue_share": Estimate.of_count(by_shape + by_texture, n),
        "shape_accuracy": Estimate.of_count(by_shape, n),
        "texture_accuracy": Estimate.of_count(by_texture, n),
        "majority_agreement": Estimate.of_count(int((decided == majority).sum()), int((majority >= 0).sum())),
    }
    by_class = {
        label: Estimate.of_count(int(shape[own].sum()), int((shape + texture)[own].sum()))
        for label, own in ((label, answers.shape == index) for index, label in enumerate(classes))
    }
    return replace(observed, figures={**observed.figures, **counted}, by_class=by_class)


def observe_humans(answers: Answers, draws: Draws, classes: Sequence[str]) -> Observed:
    """The figures of the people themselves; images with one answer say nothing of agreement."""
    n = answers.people.astype(float)
    shape, texture = answers.of(answers.shape), answers.of(answers.texture)
    pairs = n * (n - 1)
    several = n > 1
    counts = answers.counts.astype(float)
    together = (counts * (counts - 1)).sum(axis=1)
    same = shape * (shape - 1) + (n - shape) * (n - shape - 1)
    right = shape / n
    agreement: dict[str, Figure] = {
        "human_agreement": ratio(divided(together, pairs), several),
        "majority_agreement": ratio(*_leave_one_out(answers)),
        "error_consistency": _kappa(divided(same, pairs), right, right, several.astype(float)),
    }
    return _observed("humans", agreement, (shape, texture, n), answers, draws, classes)


def _observed(
    name: str,
    agreement: Mapping[str, Figure],
    decided: tuple[Floats, Floats, Floats],
    answers: Answers,
    draws: Draws,
    classes: Sequence[str],
) -> Observed:
    """Put the figures of either kind of observer together; `decided` is by shape, by texture, and all decisions."""
    shape, texture, total = decided
    cue = shape + texture
    figures: dict[str, Figure] = {
        "shape_bias": ratio(shape, cue),
        "cue_share": ratio(cue, total),
        "shape_accuracy": ratio(shape, total),
        "texture_accuracy": ratio(texture, total),
        **agreement,
    }
    values = {key: figures[key](draws.weights) for key in FIGURES}
    by_class = {}
    for index, label in enumerate(classes):
        own = answers.shape == index
        by_class[label] = Estimate.of(ratio(shape * own, cue * own)(draws.weights))
    estimates = {key: Estimate.of(value) for key, value in values.items()}
    return Observed(name, estimates, by_class, int(shape.sum()), int(texture.sum()), values)


def _kappa(same: Floats, a: Floats, b: Floats, counted: Floats) -> Figure:
    """Cohen's kappa from each image's chance of agreeing, and either side's chance of being right."""

    def figure(weights: Floats) -> Floats:
        observed, p, q = (ratio(x * counted, counted)(weights) for x in (same, a, b))
        chance = p * q + (1 - p) * (1 - q)
        return divided(observed - chance, 1 - chance, missing=np.nan)

    return figure


def _sole_majority(counts: Integers) -> Integers:
    """(n,) the most frequent class of (n, c) counts, -1 where there is none or several."""
    most = counts.max(axis=1)
    sole = (most > 0) & ((counts == most[:, None]).sum(axis=1) == 1)
    return np.where(sole, counts.argmax(axis=1), -1)


def _leave_one_out(answers: Answers) -> tuple[Floats, Floats]:
    """(n,) people who agree with the majority of the image's others, and (n,) those whose others have one."""
    agreeing, judged = np.zeros(len(answers.shape)), np.zeros(len(answers.shape))
    for index in range(answers.counts.shape[1]):
        people = answers.counts[:, index]
        others = answers.counts.copy()
        others[:, index] -= people > 0
        majority = _sole_majority(others)
        agreeing += people * (majority == index)
        judged += people * (majority >= 0)
    # Who did not answer agrees with no majority.
    judged += answers.unanswered * (_sole_majority(answers.counts) >= 0)
    return agreeing, judged
