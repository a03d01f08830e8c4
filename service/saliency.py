"""Saliency: which parts of an image make it similar to an exemplar, by integrated gradients.

Sundararajan, Taly and Yan, 2017, "Axiomatic attribution for deep networks": Eq. 1 along the straight path from a plain
grey image x' to the image x, of the cosine to an exemplar as a function of the encoder's input pixels. By its
Proposition 1 (completeness) all attributions together are the similarity of x less that of x'.

How smooth the cosine is along the path differs much between encoders: for robust ones a few steps are enough, for a
clean one hundreds of equal ones are not. So the path is cut where it is needed. Since the integral over a piece is
known (the cosine at its end less that at its start), so is the error of every piece, and the worst one is halved until
all errors together are small. Knows nothing of pools, verdicts or requests.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from perception.encoder import Encoder
from perception.errors import NonFiniteEmbedding
from perception.preprocess import to_pixels
from service.errors import AttributionFailed

BASELINE = 0.5
"""Value of every pixel of the baseline, in [0, 1]: grey."""
TOLERANCE = 0.02
"""Cosine that the errors of all pieces of the path may come to before the worst of them is halved."""
MAX_STEPS = 96
"""Images of the path that are differentiated at most."""
MAX_CELLS = 16
"""Rows and columns of a grid at most."""
_FEWEST_CELLS = 8
_FIRST_PIECES = 2
_NODES = 4  # of Gauss and Legendre's rule in each piece, which travel together


class Abandoned(Exception):
    """Nobody waits for the attribution any more."""


@dataclass(frozen=True, eq=False)
class Attribution:
    """What the similarity of an image to one exemplar is made of.

    Attributes:
        grid: (g, g) float64; what the pixels of each cell, in row-major order from the upper left, add to the
            similarity of the baseline (positive) or take from it (negative), all channels together.
        similarity: cosine of image and exemplar, in [-1, 1].
        baseline_similarity: cosine of the grey image and the exemplar, in [-1, 1].
        steps: images of the path that were differentiated.
    """

    grid: NDArray[np.float64]
    similarity: float
    baseline_similarity: float
    steps: int

    @property
    def completeness_error(self) -> float:
        """How far the grid's sum is from `similarity - baseline_similarity`, at least 0."""
        return abs(float(self.grid.sum()) - (self.similarity - self.baseline_similarity))


@dataclass(frozen=True, eq=False)
class _Piece:
    """The part of the path from `start` to `end`, in [0, 1].

    Attributes:
        start_cosines, end_cosines: (k,) of the images there to the exemplars.
        maps: (k, h, w) float64, the attributions of this part.
    """

    start: float
    end: float
    start_cosines: NDArray[np.float64]
    end_cosines: NDArray[np.float64]
    maps: NDArray[np.float64]

    @property
    def error(self) -> float:
        """Of the exemplar with the worst."""
        gained = self.end_cosines - self.start_cosines
        return float(np.abs(self.maps.sum(axis=(1, 2)) - gained).max())


class _Path:
    """The straight path from grey to one image, and the cosines of its images to k exemplars.

    Args:
        encoder: differentiable.
        pixels: (3, h, w) uint8.
        exemplars: (k, d) unit float32.
    """

    def __init__(self, encoder: Encoder, pixels: NDArray[np.uint8], exemplars: NDArray[np.float32]) -> None:
        device = torch.device(getattr(encoder, "device", "cpu"))
        self._encoder = encoder
        self._way = to_pixels([pixels]).to(device) - BASELINE
        self._exemplars = torch.from_numpy(np.ascontiguousarray(exemplars)).to(device)
        nodes, weights = np.polynomial.legendre.leggauss(_NODES)
        self._nodes, self._weights = (nodes + 1) / 2, weights / 2
        self.steps = 0

    def ends(self) -> NDArray[np.float64]:
        """Cosines (2, k) of grey and of the image."""
        with torch.no_grad():
            return _checked(self._cosines(self._images([0.0, 1.0])), "a similarity")

    def piece(self, start: float, end: float, start_cosines: NDArray[np.float64]) -> _Piece:
        """Differentiate along a part of the path; one pass forward, and one back for each exemplar."""
        at = start + (end - start) * self._nodes
        images = self._images([*at, end]).requires_grad_(True)
        cosines = self._cosines(images)
        self.steps += _NODES
        maps, k = [], cosines.shape[1]
        for column in range(k):
            [gradient] = torch.autograd.grad(cosines[:_NODES, column].sum(), images, retain_graph=column + 1 < k)
            per_image = (gradient[:_NODES] * self._way).double().sum(dim=1).cpu().numpy()
            maps.append(np.tensordot((end - start) * self._weights, per_image, axes=1))
        attributed = _checked(torch.from_numpy(np.stack(maps)), "an attribution")
        end_cosines = _checked(cosines[_NODES].detach(), "a similarity")
        return _Piece(start, end, start_cosines, end_cosines, attributed)

    def _images(self, at: Sequence[float]) -> Tensor:
        shares = torch.tensor(np.asarray(at, np.float32), device=self._way.device).view(-1, 1, 1, 1)
        return BASELINE + shares * self._way

    def _cosines(self, images: Tensor) -> Tensor:
        """(b, k); errors name what happened, since rows of the path mean nothing to anybody."""
        try:
            embeddings = self._encoder.encode(images)
        except NonFiniteEmbedding as error:
            raise AttributionFailed("an image between plain grey and this one has no embedding") from error
        found: Tensor = embeddings @ self._exemplars.to(embeddings.device).T
        return found


def attribute(
    encoder: Encoder,
    pixels: NDArray[np.uint8],
    exemplars: NDArray[np.float32],
    *,
    wanted: Callable[[], bool] = lambda: True,
    refine: Callable[[], bool] = lambda: True,
) -> tuple[Attribution, ...]:
    """Attribute the similarities of one image to k exemplars, which share the passes through the encoder.

    Args:
        encoder: any whose `encode` is differentiable.
        pixels: (3, h, w) uint8, as the encoder sees the image.
        exemplars: (k, d) unit float32, k at least 1.
        wanted: asked between batches whether to go on.
        refine: asked whether there is time to make the errors smaller than the first pieces have them.

    Raises:
        Abandoned: it is not wanted any more.
        AttributionFailed: a similarity or an attribution is not a finite number, or the encoder has no embedding of an
            image on the way.
    """
    # Whoever calls may be in inference mode, in which nothing has a gradient.
    with torch.inference_mode(False), torch.enable_grad():
        path = _Path(encoder, pixels, exemplars)
        start, finish = path.ends()
        pieces: list[_Piece] = []
        for number in range(_FIRST_PIECES):
            _require(wanted)
            cosines = pieces[-1].end_cosines if pieces else start
            pieces.append(path.piece(number / _FIRST_PIECES, (number + 1) / _FIRST_PIECES, cosines))
        while sum(piece.error for piece in pieces) > TOLERANCE and path.steps + 2 * _NODES <= MAX_STEPS and refine():
            worst = max(range(len(pieces)), key=lambda at: pieces[at].error)
            whole = pieces[worst]
            middle = (whole.start + whole.end) / 2
            _require(wanted)
            first = path.piece(whole.start, middle, whole.start_cosines)
            _require(wanted)
            pieces[worst : worst + 1] = [first, path.piece(middle, whole.end, first.end_cosines)]
        maps = np.sum([piece.maps for piece in pieces], axis=0)
    return tuple(
        Attribution(pooled(maps[row]), float(finish[row]), float(start[row]), path.steps) for row in range(len(maps))
    )


def pooled(attributions: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sums over the cells of a square grid, so that their sum stays what it was.

    Args:
        attributions: (n, n).

    Returns:
        (g, g); g is the largest divisor of n in 8..16, so that all cells have one size. Where there is none, g is 16,
        or n where that is less, and the sizes of cells differ by at most one pixel.
    """
    size = attributions.shape[0]
    divisors = [cells for cells in range(_FEWEST_CELLS, MAX_CELLS + 1) if size % cells == 0]
    cells = max(divisors, default=min(MAX_CELLS, size))
    starts = np.arange(cells) * size // cells
    by_row = np.add.reduceat(attributions, starts, axis=0)
    return np.asarray(np.add.reduceat(by_row, starts, axis=1), np.float64)


def _require(wanted: Callable[[], bool]) -> None:
    if not wanted():
        raise Abandoned


def _checked(values: Tensor, what: str) -> NDArray[np.float64]:
    """As numbers, all of them finite."""
    if not bool(torch.isfinite(values).all()):
        raise AttributionFailed(f"{what} is not a finite number")
    return np.asarray(values.double().cpu().numpy(), np.float64)
