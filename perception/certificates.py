"""Certified radii: how far an image may move before a decision by similarities can change (methods 8.1).

Owns the formulas. Knows no images, encoders, policies or indexes.

Let f be the features of an image, before normalisation, and L a Lipschitz constant of theirs in L2. A similarity is
`<f, e> / |f|`, so that every decision depends on the direction of f alone, and all of them are of one kind: whether

    <f, c> > g |f|                                                                                              (1)

for a fixed c and g. An exemplar a is nearer than b by more than g for c = a - b; a is more similar than g for c = a.
An image that moves by r moves f by at most L r: it is enough to know how far f may move while (1) goes on to hold.
Two lower bounds of that distance, of which the larger counts (`_holding`):

- Exact, if f may move anywhere. (1) says that the angle of f and c is below `arccos(g / |c|)`. A point within s < |f|
  of f lies within the angle `arcsin(s / |f|)` of it, so that (1) holds up to
  `s = |f| sin(arccos(g / |c|) - arccos(<f, c> / (|f| |c|)))`; beyond 90 degrees, up to |f|. For g = 0 this is
  `<f, c> / |c|`, the published certificates without their condition on |f|.
- If some coordinates of f never move (the bias dimension), only the others of c matter, whose norm is |c'|. Moving by s
  takes at most `s |c'|` off the left side of (1) and adds at most `s |g|` to the right one, so that (1) holds below
  `s = (<f, c> - g |f|) / (|c'| + |g|)`; for g = 0 that is `<f, c> / |c'|`, exact and more than `<f, c> / |c|`.

Float rounding is part of the contract: a radius holds for what the software decides, not for exact arithmetic. For that
g is raised by what computed similarities can be off (`similarity_error`), the distance shortened by the error of two
forward passes, and L raised by what a constant that is computed in float32 can be too low.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

FORWARD_ERROR = 1e-6
"""Of computed features, in L2, by that of the largest possible input: what |features - exact ones| may be, divided by
`L sqrt(values)`. A layer that is 1-Lipschitz passes errors on unmagnified and adds its own, which is relative to its
activations; measured on LipSim networks it is below 2e-7 (1.6e-7 at the published size, 224 px).
"""
CONSTANT_ERROR = 1e-5
"""Relative: how much larger than the proven constant, in exact arithmetic, one of weights in float32 may be."""
_UNIT_ROUNDOFF = 2.0**-24


@dataclass(frozen=True)
class FeatureBound:
    """What is proven of an encoder's features.

    Attributes:
        lipschitz: L, of features over pixels in [0, 1], both in L2.
        values: of one input image, 3 * h * w.
        fixed: how many of the last coordinates of the features are constants; 1 with a bias dimension.
    """

    lipschitz: float
    values: int
    fixed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lipschitz) and self.lipschitz > 0) or self.values < 1 or self.fixed < 0:
            raise ValueError(f"impossible bound: {self}")

    def pixels(self, distances: Array | float) -> Array:
        """Radii in pixel units from distances that features may move.

        They are at least 0, and at most the diagonal of the box of all images, beyond which there are none.
        """
        diagonal = math.sqrt(self.values)
        radii = np.asarray(distances) / (self.lipschitz * (1 + CONSTANT_ERROR)) - 2 * FORWARD_ERROR * diagonal
        return np.asarray(np.clip(radii, 0.0, diagonal))

    def moving(self, vectors: Array) -> Array:
        """The coordinates of (..., d) that can move."""
        return vectors[..., : vectors.shape[-1] - self.fixed]


def feature_bound(encoder: object) -> FeatureBound | None:
    """What is proven of an encoder's `features`; None where nothing is, or where rounding takes it away.

    That is so for another precision than fp32, and on a GPU whose convolutions or products round to TF32, three
    decimals, as they do unless `torch.backends.cudnn.allow_tf32` is turned off.

    Args:
        encoder: such as `load_encoder` gives; read are `lipschitz`, `precision`, `preprocess`, `device` and, said by
            the family alone and never found out from numbers, `bias_dim`: that the last feature is a constant.
    """
    lipschitz = getattr(encoder, "lipschitz", None)
    if lipschitz is None or getattr(encoder, "precision", None) != "fp32" or _rounds_to_tf32(encoder):
        return None
    size_px: int = encoder.preprocess.size_px  # type: ignore[attr-defined]  # an Encoder has it
    return FeatureBound(float(lipschitz), 3 * size_px * size_px, int(getattr(encoder, "bias_dim", False)))


def _rounds_to_tf32(encoder: object) -> bool:
    if str(getattr(encoder, "device", "cpu")).startswith("cpu"):
        return False
    import torch  # not at the top: the formulas are used where torch is not loaded

    return bool(torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)


def similarity_error(dim: int) -> float:
    """How far a computed similarity of unit float32 embeddings (d,) may be from the true one.

    A product of d terms in float32 is off by at most 6 sqrt(d) u, u = 2^-24, whatever the order of summation, but for
    a probability of 3e-8 under the model of Higham and Mary (2019, theorem 2.4, lambda = 6); the norms of a cosine add
    as much again. 3e-5 for d = 1792. (The certain bound, d u, is 20 times that.)
    """
    return 12 * math.sqrt(dim) * _UNIT_ROUNDOFF


# --- 2AFC ------------------------------------------------------------------------------------------------------------


def two_afc_radii(reference: NDArray[np.floating], left: NDArray[np.floating], right: NDArray[np.floating],
                  bound: FeatureBound) -> Array:  # fmt: skip
    """Certified radii of choices by cosine, with the reference perturbed: the tighter form of methods 8.1.

    `|<f, c>| / |c|` with c the difference of the two unit candidates: (1) with g = 0, for either sign. The norm of f
    is free. With a bias dimension the norm of c leaves the constant coordinate out.

    Args:
        reference: (n, d) features, not normalised.
        left, right: (n, d) embeddings of the candidates, of any norm but zero.
        bound: of the features.

    Returns:
        (n,) in pixel L2 units; 0 where nothing is certified: a tie, within rounding, and so equal candidates, too.

    Raises:
        ValueError: shapes that differ, or a value that is not finite.
    """
    features, difference = _checked_triplets(reference, left, right)
    return bound.pixels(_two_afc_distances(features, difference, bound))


def published_two_afc_radii(reference: NDArray[np.floating], left: NDArray[np.floating], right: NDArray[np.floating],
                            bound: FeatureBound) -> Array:  # fmt: skip
    """Certified radii of choices by cosine in the published form of methods 8.1: `|d0 - d1| / |phi0 - phi1|`.

    Here d = 1 - similarity. It is 1/|f| of the tighter form in exact arithmetic, so that it is valid where |f| >= 1 at
    the reference itself, wherever the perturbed features lie; elsewhere, and for ties, it is 0.

    Arguments, result and errors are those of `two_afc_radii`.
    """
    features, difference = _checked_triplets(reference, left, right)
    norms = np.linalg.norm(features, axis=1)
    lengths = np.linalg.norm(difference, axis=1)
    margins = np.abs((features * difference).sum(axis=1)) / np.maximum(norms, np.finfo(float).tiny)
    published = np.divide(margins, lengths, out=np.zeros_like(margins), where=lengths > 0)
    # What rounding takes off the tighter form, it takes off this one.
    radii = bound.pixels(np.minimum(published, _two_afc_distances(features, difference, bound)))
    return np.where(norms >= 1, radii, 0.0)


def _checked_triplets(reference: NDArray[np.floating], left: NDArray[np.floating],
                      right: NDArray[np.floating]) -> tuple[Array, Array]:  # fmt: skip
    """Features and the differences of the unit candidates, (n, d) each."""
    if reference.ndim != 2 or not reference.shape == left.shape == right.shape:
        raise ValueError(f"expected three (n, d), got {reference.shape}, {left.shape} and {right.shape}")
    features, *candidates = (each.astype(np.float64) for each in (reference, left, right))
    lengths = [np.linalg.norm(each, axis=1, keepdims=True) for each in candidates]
    if not np.isfinite(features).all() or not all(np.all(np.isfinite(each) & (each > 0)) for each in lengths):
        raise ValueError("embeddings must be finite, and candidates not zero")
    return features, candidates[1] / lengths[1] - candidates[0] / lengths[0]


def _two_afc_distances(features: Array, difference: Array, bound: FeatureBound) -> Array:
    return _holding(
        np.linalg.norm(features, axis=1),
        np.abs((features * difference).sum(axis=1)),
        np.linalg.norm(difference, axis=1),
        np.linalg.norm(bound.moving(difference), axis=1),
        np.full(len(features), 2 * similarity_error(features.shape[1])),
    )


# --- nearest exemplars -----------------------------------------------------------------------------------------------


def nearest_radius(features: NDArray[np.floating], winning: NDArray[np.floating], others: NDArray[np.floating],
                   bound: FeatureBound) -> float:  # fmt: skip
    """Certified radius of "the nearest exemplar is of the winning class": the retrieval form of methods 8.1.

    `min over b of max over a of <f, a - b> / |a - b|`, a of the winning class and b of the others. As long as f moves
    by less, every b has an a that stays nearer than it, whichever that is: so no b is the nearest. (The best a may be
    another for each b; the nearest one for all of them gives a smaller radius.)

    Args:
        features: (d,), not normalised.
        winning, others: (n, d) and (m, d) unit embeddings, all that there are; n at least 1.
        bound: of the features.

    Returns:
        In pixel L2 units; 0 where nothing is certified. Without others the diagonal of the box: nothing can change.

    Raises:
        ValueError: other shapes.
    """
    if len(winning) < 1 or winning.shape[1:] != features.shape or others.shape[1:] != features.shape:
        raise ValueError(f"expected (d,), (n, d) and (m, d), got {features.shape}, {winning.shape} and {others.shape}")
    geometry = Geometry(features, np.concatenate([winning, others]), bound)
    ahead = geometry.ahead(np.arange(len(winning)), np.arange(len(winning), len(geometry)), 0.0)
    return float(bound.pixels(ahead.max(axis=0).min(initial=np.inf)))


class Geometry:
    """Features among embeddings: how far the features may move while what is asked goes on to hold.

    All distances are of features, in L2, at least 0, and infinite for what holds anywhere. Similarities are those that
    an index computes, products with the unit embedding, clipped to [-1, 1].

    Args:
        features: (d,), not normalised, not zero.
        embeddings: (n, d) of nearly unit norm, as they are searched.
        bound: of the features.

    Attributes:
        norm: |f|.
        similarities: (n,), not clipped.
    """

    def __init__(self, features: NDArray[np.floating], embeddings: NDArray[np.floating], bound: FeatureBound) -> None:
        f, e = features.astype(np.float64), embeddings.astype(np.float64)
        if f.ndim != 1 or e.shape[1:] != f.shape or not (np.isfinite(f).all() and f.any() and np.isfinite(e).all()):
            raise ValueError(f"expected finite (d,), not zero, and (n, d), got {f.shape} and {e.shape}")
        self._features, self._bound = f, bound
        self.norm = float(np.linalg.norm(f))
        self._inner = e @ f
        self.similarities = self._inner / self.norm
        self._products, self._moving = (each @ each.T for each in (e, bound.moving(e)))
        self._norms = np.linalg.norm(e, axis=1)
        # Clipping at 1 takes this much off the similarity of a row, at most.
        self._overlong = np.maximum(self._norms - 1, 0)
        self._error = similarity_error(len(f))

    def __len__(self) -> int:
        return len(self._norms)

    def ahead(self, rows: NDArray[np.intp], others: NDArray[np.intp], gap: float) -> Array:
        """Up to where a row is more similar than another by at least `gap`, and strictly: (len(rows), len(others))."""
        lengths, moving = (_differences(products, rows, others) for products in (self._products, self._moving))
        gaps = np.broadcast_to((gap + 2 * self._error + self._overlong[rows])[:, None], lengths.shape)
        return _holding(self.norm, self._inner[rows][:, None] - self._inner[others], lengths, moving, gaps)

    def ahead_of_unseen(self, rows: NDArray[np.intp], ceiling: float, longest: float, gap: float) -> Array:
        """The same for embeddings that nobody has looked at: (len(rows),).

        Let s be the similarity of a row and t that of the other, at most `ceiling`. Within the angle x of f the one is
        at least `s cos x - sqrt(|a|^2 - s^2) sin x`, the other at most `t cos x + sqrt(|b|^2 - t^2) sin x`, which grows
        with t and |b|. Their difference is at least `p cos x - q sin x = hypot(p, q) cos(x + atan2(q, p))`, p = s - t,
        which falls with x. For unit norms and no gap it is 0 at half of the difference of the two angles to f, so that
        features may move by `|f| sin((angle to b - angle to a) / 2)`.

        Args:
            rows: at similarities that are at least `ceiling`, else nothing is certified.
            ceiling: no unseen similarity is above it.
            longest: no unseen norm is above it; at least 1.
            gap: see `ahead`.
        """
        own = self.similarities[rows]
        p = own - ceiling
        q = np.sqrt(np.maximum(self._norms[rows] ** 2 - own**2, 0)) + math.sqrt(max(longest**2 - ceiling**2, 0))
        reach, gaps = np.hypot(p, q), gap + 2 * self._error + self._overlong[rows]
        angles = np.arccos(np.clip(gaps / np.maximum(reach, np.finfo(float).tiny), -1, 1)) - np.arctan2(q, p)
        return np.where(p > gaps, self.norm * np.sin(np.clip(angles, 0, np.pi / 2)), 0.0)

    def above(self, rows: NDArray[np.intp], threshold: float) -> Array:
        """Up to where a row is more similar than a threshold: (len(rows),)."""
        norms = self._norms[rows]
        moving = np.sqrt(np.diagonal(self._moving)[rows])
        gaps = np.full(len(rows), threshold + self._error)
        return _holding(self.norm, self._inner[rows], norms, moving, gaps)

    def on_their_sides(self, directions: Array, thresholds: Array) -> Array:
        """Up to where the cosine with each direction (m, d), of unit norm, stays on its side of a threshold: (m,)."""
        inner = directions @ self._features
        sides = np.where(inner >= thresholds * self.norm, 1.0, -1.0)
        moving = np.linalg.norm(self._bound.moving(directions), axis=1)
        return _holding(self.norm, sides * inner, np.ones_like(inner), moving, sides * thresholds + self._error)


def _differences(products: Array, rows: NDArray[np.intp], others: NDArray[np.intp]) -> Array:
    """Norms (len(rows), len(others)) of differences of vectors, from all inner products (n, n).

    Of vectors nearer than 1e-6 the norm is not known well, but the similarities of such differ by no more than
    rounding, so that nothing is certified of them anyway.
    """
    squares = np.diagonal(products)
    between = squares[rows][:, None] + squares[others] - 2 * products[np.ix_(rows, others)]
    return np.asarray(np.sqrt(np.maximum(between, 0)))


def _holding(norm: float | Array, inner: Array, length: Array, moving: Array, gap: Array) -> Array:
    """Distances by which f may move while (1) holds; 0 where it does not hold now. See the module.

    Args:
        norm: |f|.
        inner: <f, c>.
        length, moving: |c| and |c'|.
        gap: g.
    """
    slack = inner - gap * norm
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        linear = slack / (moving + np.abs(gap))
        angles = np.arccos(np.clip(gap / length, -1, 1)) - np.arccos(np.clip(inner / (norm * length), -1, 1))
    cone = norm * np.sin(np.clip(np.nan_to_num(angles), 0, np.pi / 2))
    found: Array = np.where(slack > 0, np.maximum(linear, cone), 0.0)
    return np.where(gap < -length, np.inf, found)
