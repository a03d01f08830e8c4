"""Cue-conflict figures against closed forms and against people and images taken one by one."""

from collections import Counter
from itertools import permutations

import numpy as np
import pytest

from offline.benchmarks.bootstrap import Draws, Estimate
from offline.benchmarks.cue_conflict_figures import FIGURES, Answers, Observed, observe_humans, observe_machine
from offline.errors import DataError, PlanError
from perception.intervals import wilson_interval

CLASSES = ("bear", "car", "cat", "oven")


def answers_of(images: list[tuple[str, str, str]]) -> Answers:
    """From (shape, texture, one letter an answer: b, a, t, o for the classes, - for none)."""
    letters = {"b": 0, "a": 1, "t": 2, "o": 3}
    counts = np.zeros((len(images), len(CLASSES)), dtype=np.int64)
    for row, (_, _, given) in enumerate(images):
        for letter in given.replace("-", ""):
            counts[row, letters[letter]] += 1
    return Answers(
        np.array([CLASSES.index(shape) for shape, _, _ in images]),
        np.array([CLASSES.index(texture) for _, texture, _ in images]),
        counts,
        np.array([given.count("-") for _, _, given in images]),
    )


def random_images(n: int, seed: int) -> list[tuple[str, str, str]]:
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(n):
        shape, texture = rng.choice(CLASSES, size=2, replace=False)
        given = rng.choice(list("bato-"), size=rng.integers(1, 11), p=rng.dirichlet(np.ones(5)))
        images.append((str(shape), str(texture), "".join(given)))
    return images


def values(observed: Observed) -> dict[str, float | None]:
    return {name: estimate.value for name, estimate in observed.figures.items()}


IMAGES = [
    ("bear", "car", "bbbbbbbbbb"),
    ("bear", "cat", "bbbbbttt--"),
    ("car", "bear", "aaaaabbbbb"),
    ("cat", "oven", "oooooooooo"),
]


def test_closed_forms_of_an_encoder() -> None:
    answers, draws = answers_of(IMAGES), Draws(4, 200, 0)
    observed = observe_machine("e", ["bear", "cat", "oven", "cat"], answers, draws, CLASSES)
    found = values(observed)
    assert found["shape_bias"] == pytest.approx(2 / 3)  # bear and cat by shape, cat by texture
    assert found["cue_share"] == 0.75
    assert found["shape_accuracy"] == 0.5
    assert found["texture_accuracy"] == 0.25
    assert found["human_agreement"] == pytest.approx((10 + 3 + 0 + 0) / 40)
    assert found["majority_agreement"] == pytest.approx(1 / 3)  # the third image has two most frequent answers
    # Of being right: (1, 0, 0, 1) against shares 1, .5, .5, 0: agreement (1 + .5 + .5 + 0) / 4, chance by p = q = .5.
    assert found["error_consistency"] == pytest.approx(0.0)
    assert (observed.by_shape, observed.by_texture) == (2, 1)
    assert {name: estimate.value for name, estimate in observed.by_class.items()} == {
        "bear": 0.5, "car": None, "cat": 1.0, "oven": None,
    }  # fmt: skip


def test_closed_forms_of_people() -> None:
    found = values(observe_humans(answers_of(IMAGES), Draws(4, 200, 0), CLASSES))
    shape, texture = 10 + 5 + 5 + 0, 0 + 3 + 5 + 10
    assert found["shape_bias"] == pytest.approx(shape / (shape + texture))
    assert found["cue_share"] == pytest.approx((shape + texture) / 40)
    assert found["human_agreement"] == pytest.approx((90 + (20 + 6) + (20 + 20) + 90) / (4 * 90))
    # Of the third image each person's five like-minded lose one, so that the others' majority is the other answer.
    assert found["majority_agreement"] == pytest.approx((10 + 5 + 0 + 10) / 40)


def test_a_perfect_observer_and_one_mind() -> None:
    images = [("bear", "car", "bbb"), ("cat", "oven", "ttt"), ("car", "bear", "ooo")]
    answers, draws = answers_of(images), Draws(3, 50, 0)
    machine = values(observe_machine("e", ["bear", "cat", "oven"], answers, draws, CLASSES))
    people = values(observe_humans(answers, draws, CLASSES))
    for name in ("human_agreement", "majority_agreement", "error_consistency", "shape_bias"):
        assert machine[name] == people[name] == pytest.approx(1.0), name


def test_what_nothing_defines_is_none_and_not_a_number() -> None:
    answers, draws = answers_of([("bear", "car", "o"), ("cat", "oven", "-")]), Draws(2, 50, 0)
    machine = observe_machine("e", ["oven", "car"], answers, draws, CLASSES)
    people = observe_humans(answers, draws, CLASSES)
    assert machine.figures["shape_bias"] == people.figures["shape_bias"] == Estimate(None, None)
    assert people.figures["human_agreement"] == Estimate(None, None)  # nobody saw what another one saw
    assert machine.figures["error_consistency"] == Estimate(None, None)  # neither was ever right: chance explains all
    assert machine.minus(people)["shape_bias"] == Estimate(None, None)
    assert machine.as_dict()["shape_bias"] == {"value": None, "interval95": None}


@pytest.mark.parametrize("seed", range(6))
def test_people_against_people_one_by_one(seed: int) -> None:
    images = random_images(30, seed)
    letters = dict(zip("bato", CLASSES, strict=True))
    together, judged, agreeing, same, right = [], 0, 0, [], []
    for shape, _, given in images:
        pairs = list(permutations(range(len(given)), 2))
        names = [letters.get(letter, "") for letter in given]
        if pairs:
            together.append(np.mean([names[i] == names[j] != "" for i, j in pairs]))
            same.append(np.mean([(names[i] == shape) == (names[j] == shape) for i, j in pairs]))
            right.append(np.mean([name == shape for name in names]))
        for i, name in enumerate(names):
            most = Counter(other for j, other in enumerate(names) if j != i and other).most_common(2)
            if most and (len(most) == 1 or most[0][1] > most[1][1]):
                judged += 1
                agreeing += name == most[0][0]
    found = values(observe_humans(answers_of(images), Draws(30, 50, 0), CLASSES))
    assert found["human_agreement"] == pytest.approx(np.mean(together))
    assert found["majority_agreement"] == pytest.approx(agreeing / judged)
    p = np.mean(right)
    chance = p * p + (1 - p) * (1 - p)
    assert found["error_consistency"] == pytest.approx((np.mean(same) - chance) / (1 - chance))


@pytest.mark.parametrize("seed", range(6))
def test_an_encoder_against_people_one_by_one(seed: int) -> None:
    images = random_images(30, seed)
    letters = dict(zip("bato", CLASSES, strict=True))
    decisions = [str(name) for name in np.random.default_rng(seed + 100).choice(CLASSES, size=30)]
    shares, majority, observed_agreement, own, theirs = [], [], [], [], []
    for (shape, _, given), decision in zip(images, decisions, strict=True):
        names = [letters.get(letter, "") for letter in given]
        shares.append(np.mean([name == decision for name in names]))
        observed_agreement.append(np.mean([(name == shape) == (decision == shape) for name in names]))
        own.append(decision == shape)
        theirs.append(np.mean([name == shape for name in names]))
        most = Counter(filter(None, names)).most_common(2)
        if most and (len(most) == 1 or most[0][1] > most[1][1]):
            majority.append(decision == most[0][0])
    found = values(observe_machine("e", decisions, answers_of(images), Draws(30, 50, 0), CLASSES))
    assert found["human_agreement"] == pytest.approx(np.mean(shares))
    assert found["majority_agreement"] == pytest.approx(np.mean(majority))
    p, q = np.mean(own), np.mean(theirs)
    chance = p * q + (1 - p) * (1 - q)
    assert found["error_consistency"] == pytest.approx((np.mean(observed_agreement) - chance) / (1 - chance))


def test_error_consistency_is_cohens_kappa_of_two_machines() -> None:
    """With one person an image, who is then an observer as any other."""
    rng = np.random.default_rng(3)
    machine, person = rng.choice(CLASSES, size=200), rng.choice(list("bato"), size=200)
    answers = answers_of([("bear", "car", str(letter)) for letter in person])
    found = values(observe_machine("e", [str(name) for name in machine], answers, Draws(200, 50, 0), CLASSES))
    table = np.zeros((2, 2))
    for a, b in zip(machine == "bear", person == "b", strict=True):
        table[int(a), int(b)] += 1 / 200
    chance = float(table.sum(1) @ table.sum(0))
    assert found["error_consistency"] == pytest.approx((np.trace(table) - chance) / (1 - chance))


def test_intervals_are_wilsons_for_counts_and_hold_their_figure() -> None:
    images = random_images(60, 1)
    rng = np.random.default_rng(2)
    decisions = [str(name) for name in rng.choice(CLASSES, size=60)]
    observed = observe_machine("e", decisions, answers_of(images), Draws(60, 500, 0), CLASSES)
    by_shape = sum(decision == image[0] for decision, image in zip(decisions, images, strict=True))
    assert observed.figures["shape_accuracy"].interval == wilson_interval(by_shape, 60)
    for name in FIGURES:
        estimate = observed.figures[name]
        assert estimate.value is not None
        assert estimate.interval is not None
        assert estimate.interval[0] < estimate.value < estimate.interval[1]


def test_differences_are_paired_and_seeded() -> None:
    answers = answers_of(random_images(60, 1))
    rng = np.random.default_rng(2)
    first, second = ([str(name) for name in rng.choice(CLASSES, size=60)] for _ in range(2))
    a, b = (observe_machine("e", d, answers, Draws(60, 500, 7), CLASSES) for d in (first, second))
    gained = b.minus(a)
    for name in FIGURES:
        higher, lower, difference = b.figures[name].value, a.figures[name].value, gained[name].value
        assert higher is not None
        assert lower is not None
        assert difference == pytest.approx(higher - lower)
    assert set(a.minus(a).values()) == {Estimate(0.0, (0.0, 0.0))}
    again = observe_machine("e", second, answers, Draws(60, 500, 7), CLASSES)
    assert again.minus(a) == gained
    other = observe_machine("e", second, answers, Draws(60, 500, 8), CLASSES)
    assert other.figures["human_agreement"].interval != b.figures["human_agreement"].interval
    assert other.figures["human_agreement"].value == b.figures["human_agreement"].value


def test_what_does_not_fit_is_refused() -> None:
    answers, draws = answers_of(IMAGES), Draws(4, 2, 0)
    with pytest.raises(DataError, match="3 decisions on 4 images"):
        observe_machine("e", ["bear"] * 3, answers, draws, CLASSES)
    with pytest.raises(DataError, match="one class for both cues"):
        answers_of([("bear", "bear", "b")])
    with pytest.raises(DataError, match="nobody's answer"):
        answers_of([("bear", "car", "")])
    with pytest.raises(DataError, match="do not fit"):
        Answers(answers.shape[:3], answers.texture, answers.counts, answers.unanswered)
    for arguments in ((0, 2, 0), (4, 1, 0), (4, 2, -1)):
        with pytest.raises(PlanError, match="bootstrap"):
            Draws(*arguments)


def test_bootstrap_agrees_with_the_standard_error_of_a_mean() -> None:
    rng = np.random.default_rng(0)
    shares = rng.choice([0, 1], size=400, p=[0.3, 0.7])
    values_ = Draws(400, 4000, 0).weights @ shares / 400
    estimate = Estimate.of(values_)
    spread = 1.96 * shares.std() / 20
    assert estimate.interval is not None
    assert estimate.interval == pytest.approx((shares.mean() - spread, shares.mean() + spread), abs=0.005)
