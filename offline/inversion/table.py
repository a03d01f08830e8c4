"""Table VII: how alike an image and its reconstruction are, by who reconstructed (rows) and who judges (columns).

Both are pictures of the reconstructing encoder's size: the square that it saw, and what it was inverted to. A judge of
another size gets both enlarged or reduced to its own, with the same antialiased bicubic filter and without a crop, for
a crop would show it a part of what was to be reconstructed. So the two differ in nothing but the inversion, and what a
reconstruction gets from the encoder that made it is what was optimised. A cell is the mean over the images, of each
image's mean over seeds; intervals are of the bootstrap over the images.

Cosines of two encoders are not on one scale: one may see any two images at 0.1, another at 0.9. So the table also says
how alike two different originals are to each judge, b on average, and gives every cosine c a second time as
`(c - b) / (1 - b)`: 0 for another image, 1 for the same.
"""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from offline.benchmarks.bootstrap import Draws, Estimate, Floats, ratio
from offline.benchmarks.published import published_figure
from offline.errors import PlanError
from offline.inversion.finished import FinishedRun
from offline.inversion.run import Show
from offline.inversion.store import to_array
from perception.catalogue import card_of
from perception.encoder import Encoder
from perception.errors import FingerprintMismatch
from perception.preprocess import to_pixels

GROUP = "inversion"
"""Of published figures on the cards: under the name of the judge, the mean cosine, not in percent."""
LEGEND = "Mean cosine [95 % interval over the images] (published; - for none). Rows reconstruct, columns judge."
_TINY = 1e-9
RESCALED = "The same on one scale: 0 is another image (two different originals), 1 is the same image."
CONTRASTS = "What a judge sees in one's reconstructions, less what that one sees in the judge's; paired by image."
_OTHERS = "(two different originals)"


@dataclass(frozen=True)
class Cell:
    """One mean cosine.

    Attributes:
        generator, evaluator: who reconstructed, and who judges.
        mean: over images, of each one's mean over seeds.
        rescaled: the same between two different originals, 0, and the same image, 1; None where there is one image
            alone, or the judge takes all for one.
        published: of the cards; None where there is none.
    """

    generator: str
    evaluator: str
    mean: Estimate
    rescaled: Estimate | None
    published: float | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        names = {"generator": self.generator, "evaluator": self.evaluator}
        return {**names, **self.mean.as_dict(), "rescaled": _plain(self.rescaled), "published": self.published}


@dataclass(frozen=True)
class Contrast:
    """What a judge makes of one's reconstructions, less what that one makes of the judge's; paired by image.

    Table VII's shape is that it is negative where a clean encoder reconstructs and a robust one judges.

    Attributes:
        difference, rescaled: of cosines, and of rescaled ones as in `Cell`.
    """

    generator: str
    evaluator: str
    difference: Estimate
    rescaled: Estimate | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        names = {"generator": self.generator, "evaluator": self.evaluator}
        return {**names, **self.difference.as_dict(), "rescaled": _plain(self.rescaled)}


@dataclass(frozen=True)
class CrossTable:
    """All cells, with what they were measured on.

    Attributes:
        generators, evaluators: of the rows and columns.
        images, seeds: how many images, and the seeds.
        eight_bit: whether the PNG files were judged in place of the exact values.
        cells: row by row.
        baselines: by judge, the mean cosine of two different originals; None for a single image.
        contrasts: of each two encoders that both reconstruct and judge, in the order of the rows.
        cosines: (rows, columns, images, seeds).
    """

    generators: tuple[str, ...]
    evaluators: tuple[str, ...]
    images: int
    seeds: tuple[int, ...]
    eight_bit: bool
    cells: tuple[Cell, ...]
    baselines: dict[str, float | None]
    contrasts: tuple[Contrast, ...]
    cosines: Floats

    def as_text(self) -> str:
        """Markdown, with the contrasts below."""
        others = ["-" if (other := self.baselines[e]) is None else f"{other:.3f}" for e in self.evaluators]
        pixels = "8-bit PNG files" if self.eight_bit else "exact values"
        seeds = f"seed{'s' if len(self.seeds) > 1 else ''} {', '.join(map(str, self.seeds))}"
        parts = [
            self._markdown(lambda cell: f"{_spread(cell.mean)} ({_beside(cell.published)})", [[_OTHERS, *others]]),
            f"{LEGEND}\n{self.images} image{'s' if self.images > 1 else ''}, {seeds}; {pixels}.\n",
        ]
        if self.images > 1:
            parts += [f"\n{RESCALED}\n\n", self._markdown(lambda cell: _spread(cell.rescaled), [])]
        if self.contrasts:
            parts += [f"\n{CONTRASTS}\n\n", _rows([["judge", "reconstructed by", "cosine", "rescaled"], ["---"] * 4])]
            parts += [
                _rows([[c.evaluator, c.generator, _spread(c.difference), _spread(c.rescaled)]]) for c in self.contrasts
            ]
        return "".join(parts)

    def _markdown(self, words: Callable[[Cell], str], more: list[list[str]]) -> str:
        lines = [["reconstructed by", *self.evaluators], ["---"] * (1 + len(self.evaluators))]
        for generator in self.generators:
            lines.append([generator, *(words(cell) for cell in self.cells if cell.generator == generator)])
        return _rows(lines + more)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "table": "VII",
            "images": self.images,
            "seeds": list(self.seeds),
            "pixels": "8-bit" if self.eight_bit else "float32",
            "baselines": {name: None if x is None else round(x, 4) for name, x in self.baselines.items()},
            "cells": [cell.as_dict() for cell in self.cells],
            "contrasts": [contrast.as_dict() for contrast in self.contrasts],
        }

    def as_csv(self) -> str:
        """One row a cell."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(["generator", "evaluator", "mean", "low95", "high95", "published", "images", "seeds"])
        for cell in self.cells:
            low, high = cell.mean.interval or (None, None)
            figures = ["" if x is None else round(x, 6) for x in (cell.mean.value, low, high, cell.published)]
            writer.writerow([cell.generator, cell.evaluator, *figures, self.images, len(self.seeds)])
        return buffer.getvalue()


def cross_table(
    run: Path,
    evaluate: Sequence[str] | None = None,
    *,
    eight_bit: bool = False,
    resamples: int = 1000,
    seed: int = 0,
    device: str = "cpu",
    show: Show | None = None,
) -> CrossTable:
    """Judge the reconstructions of a finished run of images.

    All judges are loaded before the first judges.

    Args:
        run: run directory.
        evaluate: names of the judges; None for the encoders of the run.
        eight_bit: judge the PNG files in place of the exact values.
        resamples, seed: of the bootstrap.
        device: torch device.
        show: told how far it is.

    Raises:
        RunError: it is no run of images, is not finished, or is damaged.
        PlanError: a judge is named twice, or none is, or the bootstrap's numbers are impossible.
        FingerprintMismatch: a judge of the name of a reconstructing encoder is another one.
        PerceptionError: see `load_encoder`.
    """
    from perception import load_encoder

    finished = FinishedRun.read(run)
    names = tuple(finished.encoders if evaluate is None else evaluate)
    if not names or len(set(names)) < len(names):
        raise PlanError(f"judges must be one or several different encoders, got {list(names)}")
    Draws(1, resamples, seed)  # says now what is wrong with them
    judges = [load_encoder(name, precision=finished.precision, device=device) for name in names]
    return judged_by(judges, finished, eight_bit=eight_bit, resamples=resamples, seed=seed, device=device, show=show)


def judged_by(
    judges: Sequence[Encoder],
    finished: FinishedRun,
    *,
    eight_bit: bool = False,
    resamples: int = 1000,
    seed: int = 0,
    device: str = "cpu",
    show: Show | None = None,
) -> CrossTable:
    """The table of judges that are loaded, on `device`; see `cross_table`."""
    for judge in judges:
        expected = finished.fingerprints.get(judge.name)
        if expected not in (None, judge.fingerprint):
            raise FingerprintMismatch(f"{finished.path} ({judge.name})", judge.fingerprint, str(expected))
    evaluators = tuple(judge.name for judge in judges)
    cosines = np.stack(
        [
            [_cosines(judge, finished, name, eight_bit=eight_bit, device=device, show=show) for judge in judges]
            for name in finished.encoders
        ]
    )
    baselines = {judge.name: _between(_originals(judge, finished, finished.encoders[0], device)) for judge in judges}
    cells, contrasts = _figures(
        finished.encoders, baselines, cosines, Draws(len(finished.ids), resamples, seed).weights
    )
    return CrossTable(
        generators=finished.encoders,
        evaluators=evaluators,
        images=len(finished.ids),
        seeds=finished.seeds,
        eight_bit=eight_bit,
        cells=cells,
        baselines=baselines,
        contrasts=contrasts,
        cosines=cosines,
    )


def _figures(
    generators: Sequence[str], baselines: Mapping[str, float | None], cosines: Floats, draws: Floats
) -> tuple[tuple[Cell, ...], tuple[Contrast, ...]]:
    """Cells and contrasts from (rows, columns, images, seeds) cosines; the judges are those of the baselines."""
    by_image = cosines.mean(axis=3)
    raw = {(g, e): by_image[i, j] for i, g in enumerate(generators) for j, e in enumerate(baselines)}
    others = {e: b for e, b in baselines.items() if b is not None and b < 1 - _TINY}  # else all images are one to it
    scaled = {(g, e): (values - others[e]) / (1 - others[e]) for (g, e), values in raw.items() if e in others}

    def mean_of(values: Floats | None) -> Estimate | None:
        return None if values is None else _mean(values, draws)

    cells = tuple(
        Cell(g, e, _mean(values, draws), mean_of(scaled.get((g, e))), published_cosine(g, e))
        for (g, e), values in raw.items()
    )
    both = [name for name in generators if name in baselines]
    contrasts = tuple(
        Contrast(
            g,
            e,
            _mean(raw[g, e] - raw[e, g], draws),
            mean_of(scaled[g, e] - scaled[e, g] if {g, e} <= others.keys() else None),
        )
        for i, g in enumerate(both)
        for e in both[i + 1 :]
    )
    return cells, contrasts


def published_cosine(generator: str, evaluator: str) -> float | None:
    """What Table VII says, by whatever names the two encoders go; None where it says nothing."""
    card = card_of(evaluator)
    return None if card is None else published_figure(generator, GROUP, card.name)


def resized(pixels: Tensor, size_px: int) -> Tensor:
    """(b, 3, h, w) in [0, 1] to (b, 3, size_px, size_px), antialiased bicubic as Pillow's; unchanged where it fits."""
    if pixels.shape[-2:] == (size_px, size_px):
        return pixels
    return F.interpolate(pixels, size=(size_px, size_px), mode="bicubic", antialias=True).clamp(0, 1)


@torch.no_grad()
def _cosines(
    judge: Encoder, finished: FinishedRun, generator: str, *, eight_bit: bool, device: str, show: Show | None
) -> Floats:
    """(images, seeds), one picture at a time, so that none depends on the others."""
    originals = _originals(judge, finished, generator, device)
    found = np.zeros((len(finished.ids), len(finished.seeds)))
    for i, id in enumerate(finished.ids):
        for j, seed in enumerate(finished.seeds):
            if eight_bit:
                pixels = to_pixels([to_array(finished.store.picture(generator, id, seed))])
            else:
                pixels = finished.store.pixels(generator, id, seed)[None]
            found[i, j] = float((originals[i] @ _embedded(judge, pixels, device)).clamp(-1, 1))
        if show is not None:
            show(f"{generator} {judge.name}", i + 1, len(finished.ids), f"{judge.name} judges {generator}'s")
    return found


@torch.no_grad()
def _originals(judge: Encoder, finished: FinishedRun, generator: str, device: str) -> Tensor:
    """(images, d) float64 unit embeddings of what `generator` saw."""
    pictures = (finished.store.original(generator, id) for id in finished.ids)
    return torch.stack([_embedded(judge, to_pixels([to_array(picture)]), device) for picture in pictures])


def _embedded(judge: Encoder, pixels: Tensor, device: str) -> Tensor:
    return judge.encode(resized(pixels.to(device), judge.preprocess.size_px))[0].double()


def _between(embeddings: Tensor) -> float | None:
    """The mean cosine of two different rows."""
    count = len(embeddings)
    cosines = embeddings @ embeddings.T
    return float((cosines.sum() - cosines.trace()) / (count * (count - 1))) if count > 1 else None


def _mean(values: Floats, draws: Floats) -> Estimate:
    return Estimate.of(ratio(values, np.ones_like(values))(draws))


def _plain(estimate: Estimate | None) -> dict[str, Any] | None:
    return None if estimate is None else estimate.as_dict()


def _rows(lines: Sequence[Sequence[str]]) -> str:
    return "".join("| " + " | ".join(word.replace("|", "\\|") for word in line) + " |\n" for line in lines)


def _spread(estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    low, high = estimate.interval or (np.nan, np.nan)
    return f"{estimate.value:.3f} [{low:.3f}, {high:.3f}]"


def _beside(published: float | None) -> str:
    return "-" if published is None else f"{published:.2f}"
