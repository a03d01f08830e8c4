"""Checks that tell a robust encoder from one whose gradients merely mislead the attack (gradient masking).

A robust figure only says that one attack has failed. What speaks against the attack rather than for the encoder has
been collected by Athalye et al. (2018, section 3.1) and Carlini et al. (2019, section 5): gradients that are zero or
lead nowhere, a loss that more steps do not raise, perturbations without a bound that fail all the same, and weaker
attacks, or ones without gradients, that win where the stronger one does not.

Knows no data and no tasks: it takes a batch of images and the attacker's goal for each of them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor

from offline.attacks.apgd import Apgd
from offline.attacks.base import Attacked, AttackResult
from offline.attacks.pgd import Pgd
from offline.attacks.search import Problem, SearchAttack, Start, input_gradient, nothing_found
from offline.attacks.square import Square
from offline.audit.record import Check
from offline.criteria import Criterion
from offline.errors import RunError
from offline.objectives import Objective
from offline.seeds import mixed_seed
from offline.threat import ThreatModel
from perception.errors import NonFiniteEmbedding

TINY_GRADIENT = 1e-12  # of the objective's size; from there on `ThreatModel.steepest` for l2 falls short of a unit step
PROBE_STEPS = (1 / 64, 1 / 16, 1 / 4)  # of eps: coarse enough for encoders that serve in bfloat16
KEPT_PROMISE = 0.1  # share of the linear rise; noise keeps about one in the root of the number of pixels
MISLEADING_SHARE = 0.1  # of the images: a few lie at a kink of the objective
STALL = 0.02  # of the rise that all steps brought
LEFT_AT_LARGE_EPS = 0.05  # of the images
PGD_STEP_SIZES = (1 / 4, 1 / 10)  # of eps; coarse steps beat fine ones where the surface is rugged
PGD_SHARE, PGD_OBJECTIVE = 0.02, 0.05  # of the images, and of APGD's rise, by which PGD may be ahead
BLACK_BOX_SHARE, BLACK_BOX_OBJECTIVE = 0.005, 0.05  # the same for a black-box attack
_ROUNDING = 1e-6  # of an objective's size: what float32 may lose


@dataclass(frozen=True, eq=False)
class Subject:
    """A system and the images on which its attack is examined.

    Attributes:
        system: its name in the plan.
        encoder: what serves, in the precision in which it serves; it has the last word on who is fooled.
        attacked: what gradients are taken through, such as a folded twin.
        objective: what the audit's gradient attack maximises, for the whole batch.
        black_box: what an attack without gradients maximises, with what it asks of the encoder alone.
        criterion: the attacker's goal; None where there is no end to what can be gained.
        pixels: (b, 3, h, w) in [0, 1]; images that are at the goal already take no part.
        threat: what perturbations are allowed.
        stops: whether an attack with gradients leaves an image alone once `attacked` is fooled; not where `encoder` has
            a defence that `attacked` models at best.
    """

    system: str
    encoder: Attacked
    attacked: Attacked
    objective: Objective
    black_box: Objective
    criterion: Criterion | None
    pixels: Tensor
    threat: ThreatModel
    stops: bool = True

    def rows(self, index: Tensor) -> Self:
        """The same for the images `index`, (k,) int64 rows of this batch."""
        return replace(
            self,
            objective=self.objective.rows(index),
            black_box=self.black_box.rows(index),
            criterion=None if self.criterion is None else self.criterion.rows(index),
            pixels=self.pixels[index],
        )

    def stands(self, pixels: Tensor) -> Tensor:
        """(b,) bool, which of the images (b, 3, h, w) the attacker's goal is not reached for; all without a goal."""
        if self.criterion is None or not len(pixels):
            return torch.ones(len(pixels), dtype=torch.bool, device=pixels.device)
        with torch.no_grad():
            return ~self.criterion(self.encoder.encode(pixels)).to(pixels.device)


@dataclass(frozen=True)
class _Finding:
    """A check's outcome; `sentence` says what was seen, without the conclusion."""

    passed: bool
    sentence: str
    figures: Mapping[str, float]


_Examine = Callable[[Subject, int], _Finding]


def masking_checks(subject: Subject, *, steps: int, queries: int, seed: int) -> Iterator[Check]:
    """Examine an attack; yields a check as soon as it is done.

    - `gradients`: at a random start they are finite, not zero and not tiny, and a small step along them raises the
      objective as it should.
    - `loss-rises`: APGD raises the mean objective above that of its start, and more steps do not lower it.
    - `large-eps`: with perturbations that can turn any image into any other, hardly an image withstands.
    - `pgd-not-stronger`: PGD fools no more images than APGD does in as many steps.
    - `black-box`: Square fools none of the images that withstand the gradient attacks on its own objective as well.

    Without a criterion the mean objectives are compared in place of the images that withstand. A check whose attack
    breaks off because an embedding or an objective is not finite has not been passed.

    Args:
        subject: whom, and on which images.
        steps: of each attack with gradients, at least 1.
        queries: of the black-box attack; 0 leaves it out.
        seed: of the random starts, not negative.

    Raises:
        NonFiniteEmbedding: a clean image's embedding is not finite.
        PlanError: fewer than one step, or fewer than no queries.
    """
    checks: dict[str, _Examine] = {
        "gradients": _gradients,
        "loss-rises": lambda who, number: _loss_rises(who, steps, number),
        "large-eps": lambda who, number: _large_eps(who, steps, number),
        "pgd-not-stronger": lambda who, number: _pgd_not_stronger(who, steps, number),
        "black-box": lambda who, number: _black_box(who, steps, queries, number),
    }
    if not queries:
        del checks["black-box"]
    given = len(subject.pixels)
    subject = subject.rows(torch.nonzero(subject.stands(subject.pixels)).flatten())
    for name, examine in checks.items():
        if not len(subject.pixels) or not subject.threat.eps:
            why = "eps is 0" if given and not subject.threat.eps else "no image is left to attack"
            sentence = f"Nothing could be checked: {why}; of {given} images {len(subject.pixels)} can be attacked."
            yield Check(subject.system, name, False, sentence, {"images": float(len(subject.pixels))})
            continue
        try:
            found = examine(subject, seed)
        except (NonFiniteEmbedding, RunError) as error:
            found = _Finding(False, f"the attack broke off: {error}", {})
        yield Check(subject.system, name, found.passed, _sentence(found), found.figures)


def _sentence(found: _Finding) -> str:
    if found.passed:
        return f"{found.sentence[0].upper()}{found.sentence[1:]}."
    return f"Gradients appear to be masked: {found.sentence}. The figures for robustness cannot be trusted."


# --- gradients -------------------------------------------------------------------------------------------------------


def _gradients(subject: Subject, seed: int) -> _Finding:
    points = subject.threat.random_start(subject.pixels, _generator(seed, 0))
    at = points.detach().requires_grad_(True)
    with torch.enable_grad():
        value = subject.objective(subject.attacked.encode(at))
    gradient, size = input_gradient(value, at), value.detach().to(at).abs().clamp_min(1.0)
    flat = gradient.double().flatten(1)
    finite = torch.isfinite(flat).all(dim=1)
    dual = flat.abs().sum(dim=1) if subject.threat.norm == "linf" else flat.square().sum(dim=1).sqrt()
    zero, tiny = finite & (flat == 0).all(dim=1), finite & (dual < TINY_GRADIENT * size)
    usable = finite & ~tiny
    lost = {"zero": int(zero.sum()), "not finite": int((~finite).sum()), "tiny": int((tiny & ~zero).sum())}
    rows = torch.nonzero(usable).flatten()
    misleading = int((~_keeps_promise(subject.rows(rows), points[rows], gradient[rows])).sum()) if len(rows) else 0
    count = len(points)
    figures = {"images": count, **lost, "misleading": misleading, "share": (sum(lost.values()) + misleading) / count}
    too_many = misleading > max(1, MISLEADING_SHARE * count)
    passed = not any(lost.values()) and not (too_many or misleading == count)
    parts = [f"{name} for {_of(number, count)}" for name, number in lost.items() if number]
    said = f"the gradients at random starts are {_listed(parts or ['finite and not zero for all ' + _images(count)])}"
    step = "a small step along them raises the objective as it should for"
    if passed:
        said += f", and {step} {_of(count - misleading, count)}"
    elif misleading:
        said += f", but {step} only {_of(len(rows) - misleading, len(rows))}"
    if not value.requires_grad:
        said += "; the encoder's output does not depend on the pixels in a way that can be differentiated"
    return _Finding(passed, said, {name: float(number) for name, number in figures.items()})


def _keeps_promise(subject: Subject, points: Tensor, gradient: Tensor) -> Tensor:
    """(b,) bool: for some small step the objective rises by a fair share of `<gradient, step>`.

    Gradients of random signs fail: in many dimensions they are at right angles to the true ones.
    """
    kept = torch.zeros(len(points), dtype=torch.bool, device=points.device)
    with torch.no_grad():
        before = subject.objective(subject.attacked.encode(points)).to(points).double()
        for share in PROBE_STEPS:
            ahead = (points + share * subject.threat.eps * subject.threat.steepest(gradient)).clamp(0, 1)
            promised = (gradient.double() * (ahead - points).double()).sum(dim=(1, 2, 3))
            rise = subject.objective(subject.attacked.encode(ahead)).to(points).double() - before
            kept |= (rise > 0) & (rise >= KEPT_PROMISE * promised)
    return kept


# --- attacks with gradients ------------------------------------------------------------------------------------------


def _loss_rises(subject: Subject, steps: int, seed: int) -> _Finding:
    """Runs of three lengths from the same starts: APGD's step sizes depend on the length, so none contains another."""
    counts = sorted({max(1, steps // 10), max(1, steps // 3), steps})
    climbs = {n: _climb(subject, Apgd(steps=n), _generator(seed, 1), criterion=None) for n in counts}
    means = {n: reached for n, (_, reached) in climbs.items()}
    start, _ = climbs[steps]
    rise = means[steps] - start
    slack = STALL * max(rise, 0.0) + _ROUNDING * max(1.0, abs(means[steps]))
    reached = list(means.values())
    stalls = any(later < before - slack for before, later in pairwise(reached))
    figures = {"start": start, **{f"after_{count}": mean for count, mean in means.items()}}
    path = ", ".join(f"{mean:.4g} after {count} steps" for count, mean in means.items())
    if rise <= 0:
        return _Finding(False, f"the mean objective does not rise above its start: {start:.4g}, then {path}", figures)
    said = "rises, but more steps lower it again" if stalls else "rises with the number of steps"
    return _Finding(not stalls, f"the mean objective {said}: {start:.4g} at the start, {path}", figures)


def _large_eps(subject: Subject, steps: int, seed: int) -> _Finding:
    """The starts are the clean images where possible: a random one this far away is noise, which may fool by chance."""
    channels, height, width = subject.pixels.shape[1:]
    norm = subject.threat.norm
    eps = 1.0 if norm == "linf" else float(channels * height * width) ** 0.5
    large = replace(subject, threat=ThreatModel(norm, eps))
    if subject.criterion is None:
        return _large_eps_objective(subject, large, steps, seed)
    count, left = len(subject.pixels), len(_withstand(large, steps, _generator(seed, 2), start="clean").pixels)
    said = f"with {norm} {eps:.4g}, which allows any image, {_of(left, count)} still withstand{_s(left)} the attack"
    return _Finding(left <= LEFT_AT_LARGE_EPS * count, said, {"eps": eps, "images": float(count), "left": float(left)})


def _large_eps_objective(subject: Subject, large: Subject, steps: int, seed: int) -> _Finding:
    usual = _climb(subject, _apgd(subject.objective, steps, "clean"), _generator(seed, 2))[1]
    start, mean = _climb(large, _apgd(large.objective, steps, "clean"), _generator(seed, 2))
    said = (
        f"with {large.threat.norm} {large.threat.eps:.4g}, which allows any image, the mean objective goes from "
        f"{start:.4g} to {mean:.4g}, and with the audit's eps to {usual:.4g}"
    )
    figures = {"eps": large.threat.eps, "start": start, "objective": mean, "objective_at_audit_eps": usual}
    return _Finding(mean > start and mean >= usual, said, figures)


def _pgd_not_stronger(subject: Subject, steps: int, seed: int) -> _Finding:
    attacks: dict[str, SearchAttack] = {"apgd": Apgd(steps=steps)}
    for share in PGD_STEP_SIZES:
        attacks[f"pgd_eps_{round(1 / share)}"] = Pgd(
            steps=steps, step_size=share * subject.threat.eps, start="boundary"
        )
    found = {name: _attack(subject, attack, _generator(seed, 3)) for name, attack in attacks.items()}
    count = len(subject.pixels)
    if subject.criterion is None:
        return _pgd_objectives(subject, {name: _mean(result.objective) for name, result in found.items()})
    left = {name: int(subject.stands(result.adversarial).sum()) for name, result in found.items()}
    apgd, pgd = left["apgd"], min(number for name, number in left.items() if name != "apgd")
    passed = pgd >= apgd - max(1.0, PGD_SHARE * count)
    said = f"{_of(apgd, count)} withstand{_s(apgd)} APGD and {pgd} PGD, the simpler attack, in {steps} steps each"
    return _Finding(passed, said, {"images": float(count), **{name: float(number) for name, number in left.items()}})


def _pgd_objectives(subject: Subject, means: Mapping[str, float]) -> _Finding:
    start = _value(subject, subject.objective, subject.pixels)
    apgd, pgd = means["apgd"], max(mean for name, mean in means.items() if name != "apgd")
    slack = PGD_OBJECTIVE * max(apgd - start, 0.0) + _ROUNDING * max(1.0, abs(apgd))
    said = f"the mean objective is {apgd:.4g} after APGD and {pgd:.4g} after PGD, the simpler attack"
    return _Finding(pgd <= apgd + slack, said, {"clean": start, **means})


# --- attacks without gradients ---------------------------------------------------------------------------------------


def _black_box(subject: Subject, steps: int, queries: int, seed: int) -> _Finding:
    square, generator = Square(queries=queries), _generator(seed, 5)
    if subject.criterion is None:
        return _black_box_objectives(subject, steps, square, seed)
    count, left = len(subject.pixels), _withstand(subject, steps, _generator(seed, 4), start="boundary")
    resisting = len(left.pixels)
    if not resisting:
        said = "no image withstands the attacks with gradients: there is nothing that a black-box attack could add"
        return _Finding(True, said, {"images": float(count), "left": 0.0, "fooled": 0.0})
    asked = {"encoder": left.encoder, "objective": left.black_box, "criterion": left.criterion}
    found = _attack(left, square, generator, **asked)
    fooled = int((~left.stands(found.adversarial)).sum())
    said = f"a black-box attack with {queries} queries fools {fooled} of the {_images(resisting)} that withstand the " \
           f"attacks with gradients, of {count} in all"  # fmt: skip
    passed = fooled <= max(1.0, BLACK_BOX_SHARE * count)
    return _Finding(passed, said, {"images": float(count), "left": float(resisting), "fooled": float(fooled)})


def _black_box_objectives(subject: Subject, steps: int, square: Square, seed: int) -> _Finding:
    """Both are measured by the black-box attack's objective, on the encoder that serves."""
    along = _attack(
        subject, _apgd(subject.black_box, steps, "boundary"), _generator(seed, 4), objective=subject.black_box
    )
    blind = _attack(subject, square, _generator(seed, 5), encoder=subject.encoder, objective=subject.black_box)
    clean, apgd, black_box = (
        _value(subject, subject.black_box, pixels) for pixels in (subject.pixels, along.adversarial, blind.adversarial)
    )
    slack = BLACK_BOX_OBJECTIVE * max(apgd - clean, 0.0) + _ROUNDING * max(1.0, abs(apgd))
    said = f"a black-box attack with {square.queries} queries takes the mean objective from {clean:.4g} to " \
           f"{black_box:.4g}, and the attack with gradients to {apgd:.4g}"  # fmt: skip
    return _Finding(black_box <= apgd + slack, said, {"clean": clean, "apgd": apgd, "square": black_box})


# --- shared ----------------------------------------------------------------------------------------------------------


def _withstand(subject: Subject, steps: int, generator: torch.Generator, *, start: Start) -> Subject:
    """The part that withstands APGD on both objectives: with gradients one may know what the black-box attack knows."""
    objectives: Sequence[str] = ("objective", "black_box")
    for name in objectives:
        if len(subject.pixels):
            objective: Objective = getattr(subject, name)
            found = _attack(subject, _apgd(objective, steps, start), generator, objective=objective)
            subject = subject.rows(torch.nonzero(subject.stands(found.adversarial)).flatten())
    return subject


def _apgd(objective: Objective, steps: int, start: Start) -> Apgd:
    return Apgd(steps=steps, start="boundary" if objective.needs_random_start else start)


def _attack(subject: Subject, attack: SearchAttack, generator: torch.Generator, **changes: Any) -> AttackResult:
    """Run an attack on all images, by default the subject's; `changes` are fields of `Problem`."""
    criterion = subject.criterion if subject.stops else None
    problem = Problem(subject.attacked, subject.objective, criterion, subject.threat)
    found = nothing_found(subject.pixels)
    attack.go_on(replace(problem, **changes), subject.pixels, found, generator)
    return found


def _climb(subject: Subject, attack: SearchAttack, generator: torch.Generator, **changes: Any) -> tuple[float, float]:
    """The mean objective of an attack's starts, and the highest that it reached."""
    starts: list[float] = []

    def watch(rows: Tensor, update: int, best: Tensor) -> None:
        if update == 0:
            starts.append(_mean(best))

    found = _attack(subject, attack, generator, watch=watch, **changes)
    return starts[0], _mean(found.objective)


def _value(subject: Subject, objective: Objective, pixels: Tensor) -> float:
    """The mean objective on the encoder that serves."""
    with torch.no_grad():
        return _mean(objective(subject.encoder.encode(pixels)))


def _generator(seed: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed(mixed_seed(seed, number, bits=32))


def _mean(values: Tensor) -> float:
    return float(values.double().mean())


def _images(count: int) -> str:
    return f"{count} image{'' if count == 1 else 's'}"


def _of(number: int, count: int) -> str:
    return f"{number} of {_images(count)}"


def _s(number: int) -> str:
    """The ending of a verb."""
    return "s" if number == 1 else ""


def _listed(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))
