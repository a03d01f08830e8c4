"""Certified radii against a brute-force search for the worst features in the ball."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from perception.certificates import (
    CONSTANT_ERROR,
    FORWARD_ERROR,
    FeatureBound,
    Geometry,
    feature_bound,
    nearest_radius,
    published_two_afc_radii,
    similarity_error,
    two_afc_radii,
)
from perception.encoders.lipsim import LipsimConfig, LipsimNetwork, LipsimParts
from perception.preprocess import PreprocessSpec
from perception.similarity import two_afc_choice
from perception.testing import ToyEncoder
from tests.lipschitz_toy import IsometricEncoder

Array = NDArray[np.float64]
PLAIN, BIASED = FeatureBound(1.0, 400), FeatureBound(1.0, 400, fixed=1)


def unit(vectors: Array) -> NDArray[np.float32]:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True), np.float32)


def directions(seed: int, count: int, dim: int, fixed: int) -> Array:
    """Unit vectors whose last `fixed` coordinates are 0; in two dimensions all around."""
    moves = dim - fixed
    if moves == 2:
        angles = np.linspace(0, 2 * np.pi, count, endpoint=False)
        found = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    else:
        found = np.random.default_rng(seed).normal(size=(count, moves))
        found /= np.linalg.norm(found, axis=1, keepdims=True)
    return np.pad(found, ((0, 0), (0, fixed)))


def chosen(features: Array, left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.int64]:
    """What the software says."""
    made = torch.from_numpy(features.astype(np.float32))
    sides = (torch.from_numpy(side).expand_as(made) for side in (left, right))
    return np.asarray(two_afc_choice(made, *sides).numpy())


@st.composite
def triplets(draw: st.DrawFn, fixed: int) -> tuple[int, Array, NDArray[np.float32], NDArray[np.float32]]:
    """(seed, features (d,), unit candidates), in part with norms below 1 and with candidates near each other."""
    seed, dim = draw(st.integers(0, 10_000)), draw(st.integers(2, 5)) + fixed
    rng = np.random.default_rng(seed)
    features = rng.normal(size=dim) * draw(st.sampled_from([0.1, 1.0, 4.0]))
    left = rng.normal(size=dim)
    right = left + rng.normal(size=dim) * draw(st.sampled_from([1.0, 0.1, 1e-3]))
    if fixed:
        features[-1] = 1.0
    return seed, features, unit(left), unit(right)


@pytest.mark.parametrize("bound", [PLAIN, BIASED])
@given(st.data())
@settings(max_examples=80)
def test_no_features_within_the_radius_choose_the_other_candidate(bound: FeatureBound, data: st.DataObject) -> None:
    seed, features, left, right = data.draw(triplets(bound.fixed))
    [radius] = two_afc_radii(features[None], left[None], right[None], bound)
    [published] = published_two_afc_radii(features[None], left[None], right[None], bound)
    assert 0 <= published <= radius
    before = chosen(features[None], left, right)[0]
    difference = bound.moving(right.astype(float) - left)
    straight = np.pad(difference / np.linalg.norm(difference), (0, bound.fixed))
    moves = np.concatenate([directions(seed, 200, len(features), bound.fixed), [straight, -straight]])
    assert (chosen(features + radius * moves, left, right) == before).all()
    # The way straight over the border is as long, but for what rounding takes off.
    length, norm = float(np.linalg.norm(difference)), float(np.linalg.norm(features))
    border = abs(float((right.astype(float) - left) @ features)) / length
    lost = 2 * similarity_error(len(features)) * (norm + border) / length + 1e-4 * border
    assert min(border, 20) - lost - 3 * FORWARD_ERROR * np.sqrt(bound.values) <= radius
    assume(border * length > 1e-3 * (norm + border))  # float32 sees on which side of the border features are
    assert chosen((features + 1.01 * border * (straight if before == 0 else -straight))[None], left, right)[0] != before


def test_closed_forms_of_2afc() -> None:
    """f = (3, 4), candidates along the axes: the border is the diagonal, 1 / sqrt 2 away; |f| = 5."""
    f, x, y = np.array([[3.0, 4.0]]), np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
    [exact], [published] = two_afc_radii(f, x, y, PLAIN), published_two_afc_radii(f, x, y, PLAIN)
    assert exact == pytest.approx(np.sqrt(0.5), abs=1e-4)
    assert published == pytest.approx(np.sqrt(0.5) / 5, abs=1e-4)
    assert two_afc_radii(f, y, x, PLAIN) == pytest.approx(exact)  # of either choice
    assert two_afc_radii(f, 7 * x, y, PLAIN) == pytest.approx(exact)  # candidates of any norm
    [slower] = two_afc_radii(f, x, y, FeatureBound(4.0, 12))
    assert slower == pytest.approx(exact / 4, abs=1e-4)
    # A bias dimension: only the first coordinate moves, and x is as near as y when it is 4.
    [biased] = two_afc_radii(f, x, y, BIASED)
    assert biased == pytest.approx(1.0, abs=1e-4)
    short = f / 10
    assert published_two_afc_radii(short, x, y, PLAIN) == [0]  # its condition |f| >= 1 is not met
    assert two_afc_radii(short, x, y, PLAIN) == pytest.approx(exact / 10, abs=1e-4)


def test_a_tie_has_a_radius_of_0() -> None:
    f, x, y = np.array([[1.0, 1.0]]), np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
    for radii in (two_afc_radii, published_two_afc_radii):
        assert radii(f, x, y, PLAIN) == [0]
        assert radii(f, x, x, PLAIN) == [0]


@pytest.mark.parametrize(
    ("reference", "left", "right"),
    [
        (np.ones((2, 3)), np.ones((2, 3)), np.ones((1, 3))),
        (np.ones(3), np.ones(3), np.ones(3)),
        (np.full((1, 3), np.nan), np.ones((1, 3)), np.ones((1, 3))),
        (np.ones((1, 3)), np.zeros((1, 3)), np.ones((1, 3))),
        (np.ones((1, 3)), np.ones((1, 3)), np.full((1, 3), np.inf)),
    ],
)
def test_what_is_no_triplet_is_refused(reference: Array, left: Array, right: Array) -> None:
    for radii in (two_afc_radii, published_two_afc_radii):
        with pytest.raises(ValueError, match=r"expected three|finite"):
            radii(reference, left, right, PLAIN)


@pytest.mark.parametrize("bound", [PLAIN, BIASED])
@given(seed=st.integers(0, 10_000), own=st.integers(1, 4), others=st.integers(0, 5), moves=st.integers(2, 4))
@settings(max_examples=60)
def test_the_nearest_exemplar_keeps_its_class(
    bound: FeatureBound, seed: int, own: int, others: int, moves: int
) -> None:
    rng = np.random.default_rng(seed)
    dim = moves + bound.fixed
    features = rng.normal(size=dim) * rng.choice([0.2, 1.0, 5.0])
    if bound.fixed:
        features[-1] = 1.0
    exemplars = unit(features / np.linalg.norm(features) + rng.normal(size=(own + others, dim)))
    order = np.argsort(-(exemplars @ features.astype(np.float32)))
    winning, rest = exemplars[order[:own]], exemplars[order[own:]]
    radius = nearest_radius(features, winning, rest, bound)
    if not others:
        assert radius == pytest.approx(np.sqrt(bound.values), abs=1e-4)
        return
    borders = bound.moving((rest[None] - winning[:, None]).reshape(-1, dim).astype(float))
    borders = np.pad(borders / np.linalg.norm(borders, axis=1, keepdims=True), ((0, 0), (0, bound.fixed)))
    ways = np.concatenate([directions(seed, 300, dim, bound.fixed), borders])

    def kept(r: float) -> NDArray[np.bool_]:
        at = unit(features + r * ways).astype(float)
        return np.asarray((at @ winning.T.astype(float)).max(axis=1) > (at @ rest.T.astype(float)).max(axis=1))

    assert radius == 0 or kept(radius).all()
    if own == 1 and 0.01 < radius < 19:  # then it is exact, unless that is beyond the box
        assert not kept(1.02 * radius).all()


def test_equal_exemplars_of_two_classes_certify_nothing() -> None:
    same = unit(np.ones((1, 3)))
    assert nearest_radius(np.array([1.0, 2.0, 3.0]), same, same, PLAIN) == 0
    with pytest.raises(ValueError, match="expected"):
        nearest_radius(np.ones(3), same[:0], same, PLAIN)
    with pytest.raises(ValueError, match="not zero"):
        nearest_radius(np.zeros(3), same, same, PLAIN)


@given(
    near=st.floats(0, 1.4), far=st.floats(0, 3.1), gap=st.sampled_from([0.0, 0.01, 0.3]), spin=st.floats(0, 2 * np.pi)
)
def test_the_rest_may_lie_anywhere_below_the_ceiling(near: float, far: float, gap: float, spin: float) -> None:
    """Unseen exemplars at any angle beyond the ceiling's, and the worst of all: on the other side, at the ceiling."""
    a = np.array([[np.cos(near), np.sin(near), 0]])
    features = np.array([2.0, 0.0, 0.0])
    geometry = Geometry(features, a, PLAIN)
    [distance] = geometry.ahead_of_unseen(np.array([0]), float(np.cos(far)), 1.0, gap)
    angle = float(np.arcsin(min(distance / 2, 1)))
    for beyond in (0.0, 0.01, 0.5):
        at = min(far + beyond, np.pi)
        b = np.array([np.cos(at), np.sin(at) * np.cos(spin), np.sin(at) * np.sin(spin)])
        for turn in np.linspace(0, 2 * np.pi, 24):
            moved = np.array([np.cos(angle), np.sin(angle) * np.cos(turn), np.sin(angle) * np.sin(turn)])
            assert distance == 0 or float(a[0] @ moved) - float(b @ moved) > gap
    if gap == 0 and far - near > 0.1:
        assert distance == pytest.approx(2 * np.sin((far - near) / 2), abs=1e-4)
        chord = (np.sqrt(2 - 2 * np.cos(far)) - np.sqrt(2 - 2 * np.cos(near))) / 2
        assert distance >= 2 * chord - 1e-4  # the simpler bound by chords


def test_stored_embeddings_may_be_a_little_longer_than_1() -> None:
    """At the same similarity a longer one is at a wider angle, and gains more on the way towards it."""
    geometry = Geometry(np.array([2.0, 0.0]), np.array([[1.0, 0.0]]), PLAIN)
    lengths = (1.0, 1.001, 1.2)
    for length, allowed in itertools.product(lengths, lengths):
        [distance] = geometry.ahead_of_unseen(np.array([0]), 0.99, allowed, 0.0)
        longer = np.array([0.99, np.sqrt(length**2 - 0.99**2)])
        angle = np.arcsin(distance / 2)
        kept = np.array([np.cos(angle), np.sin(angle)])
        assert (kept[0] > longer @ kept) is np.bool_(length <= allowed)


@pytest.mark.parametrize("bound", [PLAIN, BIASED])
@given(seed=st.integers(0, 10_000), threshold=st.floats(-1, 1))
@settings(max_examples=80)
def test_thresholds_and_margins_hold_all_over_the_ball(bound: FeatureBound, seed: int, threshold: float) -> None:
    rng = np.random.default_rng(seed)
    dim = 2 + bound.fixed
    features = rng.normal(size=dim) * rng.choice([0.3, 1.0, 3.0])
    if bound.fixed:
        features[-1] = 1.0
    exemplars = unit(features / np.linalg.norm(features) + rng.choice([0.3, 2.0]) * rng.normal(size=(2, dim)))
    geometry = Geometry(features, exemplars, bound)
    ways = directions(seed, 720, dim, bound.fixed)

    def similarities(distance: float) -> Array:
        at = features + distance * ways
        return np.asarray((at / np.linalg.norm(at, axis=1, keepdims=True)) @ exemplars.T.astype(float))

    rows = np.array([0, 1])
    for row, distance in enumerate(geometry.above(rows, threshold)):
        if 0 < distance < np.inf:
            assert (similarities(distance)[:, row] > threshold).all()
    wide = exemplars / np.linalg.norm(exemplars.astype(float), axis=1, keepdims=True)
    for row, distance in enumerate(geometry.on_their_sides(wide, np.full(2, threshold))):
        if 0 < distance < np.inf:
            above = similarities(distance)[:, row] >= threshold
            assert above.all() or not above.any()
    [[distance]] = geometry.ahead(rows[:1], rows[1:], threshold)
    if 0 < distance < np.inf:
        assert (similarities(distance) @ [1, -1] > threshold).all()
        if not bound.fixed and distance < 0.999 * np.linalg.norm(features):  # exact
            assert (similarities(1.01 * distance + 1e-4) @ [1, -1] < threshold + 1e-4).any()


def test_what_is_proven_of_encoders() -> None:
    assert feature_bound(ToyEncoder()) is None
    assert feature_bound(IsometricEncoder(8, size_px=4, scale=2.0)) == FeatureBound(2.0, 48)
    assert feature_bound(IsometricEncoder(8, bias_dim=True)) == FeatureBound(1.0, 192, fixed=1)
    encoder = IsometricEncoder(8)
    encoder.precision = "bf16"
    assert feature_bound(encoder) is None


@pytest.mark.parametrize(("tf32", "proven"), [(True, False), (False, True)])
def test_a_gpu_that_rounds_to_three_decimals_has_no_certificates(
    tf32: bool, proven: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = IsometricEncoder(8)
    monkeypatch.setattr(IsometricEncoder, "device", torch.device("cuda:0"), raising=False)
    monkeypatch.setattr(torch, "backends", SimpleNamespace(
        cudnn=SimpleNamespace(allow_tf32=tf32), cuda=SimpleNamespace(matmul=SimpleNamespace(allow_tf32=False))
    ))  # fmt: skip
    assert (feature_bound(encoder) is not None) is proven


@pytest.mark.parametrize("bias_dim", [False, True])
def test_a_lipsim_says_itself_what_is_proven_of_it(bias_dim: bool) -> None:
    config = LipsimConfig(
        image_size=16, channels=6, depth=3, pools=(4,), dense_layers=2, dense_width=8, dim=20, bias_dim=bias_dim
    )
    torch.manual_seed(0)
    network = LipsimNetwork(config)
    spec = PreprocessSpec(size_px=16, resize_px=16, mean=(0.5,) * 3, std=(0.5, 0.25, 0.5))
    parts = LipsimParts(config, spec, network.state_dict(), "a test")
    assert feature_bound(parts.build("lipsim", "fp32", "cpu")) == FeatureBound(4.0, 3 * 16 * 16, fixed=int(bias_dim))
    assert feature_bound(parts.build("lipsim", "bf16", "cpu")) is None


def test_the_forward_pass_is_as_exact_as_certificates_need() -> None:
    """Errors against float64, a tenth of the allowance; inputs of the largest norm among them."""
    config = LipsimConfig(image_size=32, channels=12, depth=8, pools=(4,), dense_layers=4, dense_width=64, dim=96)
    torch.manual_seed(1)
    network = LipsimNetwork(config).eval().requires_grad_(False)
    pixels = torch.cat([torch.rand(5, 3, 32, 32), torch.ones(1, 3, 32, 32), torch.zeros(1, 3, 32, 32)])
    errors = network(pixels).double() - network.double()(pixels.double())
    assert float(errors.norm(dim=1).max()) < 0.3 * FORWARD_ERROR * np.sqrt(3 * 32 * 32)


@pytest.mark.parametrize("dim", [2, 64, 1793])
def test_similarities_are_as_exact_as_certificates_need(dim: int) -> None:
    made = torch.Generator().manual_seed(dim)
    a, b = (torch.randn(400, dim, generator=made) + shift for shift in (0.0, 3.0))  # sums that cancel, and that do not
    for left, right in ((a, b), (b, b.flip(0)), (a, a.flip(0))):
        one, other = (torch.nn.functional.normalize(each, dim=1) for each in (left, right))
        true = (one.double() * other.double()).sum(dim=1)
        cosines = torch.nn.functional.cosine_similarity(one, other)
        products = (one @ other.T).diagonal()
        assert float((products - true).abs().max()) < similarity_error(dim)
        true = true / (one.double().norm(dim=1) * other.double().norm(dim=1))
        assert float((cosines - true).abs().max()) < similarity_error(dim)


def test_radii_stay_in_the_box() -> None:
    bound = FeatureBound(2.0, 12)
    found = bound.pixels(np.array([0.0, 1e-9, 1.0, 1e9, np.inf]))
    assert found[0] == found[1] == 0
    assert found[2] == pytest.approx(0.5 / (1 + CONSTANT_ERROR) - 2 * FORWARD_ERROR * np.sqrt(12))
    assert list(found[3:]) == [np.sqrt(12)] * 2
    for impossible in ((0.0, 12, 0), (np.inf, 12, 0), (1.0, 0, 0), (1.0, 12, -1)):
        with pytest.raises(ValueError, match="impossible"):
            FeatureBound(*impossible)
