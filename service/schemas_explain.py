"""Conversions from explanations to what goes over the wire (`service.wire_explain`)."""

import base64
import io
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from perception.verdict import DecisionPolicy
from service.classifier import Match
from service.explaining import Compared, Reasoning
from service.wire import NeighborItem
from service.wire_explain import AttributionItem, CellItem, DecisionItem, PoolStanding, ThresholdItem

SHOWN_CELLS = 5
"""Cells of each sign that are named at most."""


def decision_item(reasoning: Reasoning, policy: DecisionPolicy, margin: float | None) -> DecisionItem:
    """The arithmetic of a decision, with the margin of its verdict."""
    return DecisionItem(
        rule=policy.rule,
        k=policy.k,
        pools=[
            PoolStanding(pool=standing.pool, best=_neighbor(standing.best), votes=standing.votes)
            for standing in reasoning.standings
        ],
        winner=reasoning.winner,
        runner_up=reasoning.runner_up,
        margin=margin,
        thresholds=[
            ThresholdItem(name=each.name, limit=each.limit, value=each.value, applies=each.applies, holds=each.holds)
            for each in reasoning.thresholds
        ],
        what_would_change=list(reasoning.facts),
    )


def attribution_item(compared: Compared) -> AttributionItem:
    """What the similarity to one exemplar is made of."""
    exemplar, found = compared.exemplar, compared.attribution
    return AttributionItem(
        exemplar=exemplar.id,
        label=exemplar.label,
        source=exemplar.source,
        judged_similarity=compared.judged,
        similarity=found.similarity,
        baseline_similarity=found.baseline_similarity,
        grid=found.grid.tolist(),
        completeness_error=found.completeness_error,
        steps=found.steps,
        supporting=_cells(found.grid, 1),
        opposing=_cells(found.grid, -1),
    )


def png_base64(pixels: NDArray[np.uint8]) -> str:
    """Pixels (3, h, w) uint8 RGB as a PNG in base64."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _cells(grid: NDArray[np.float64], sign: Literal[1, -1]) -> list[CellItem]:
    """The cells of one sign that are farthest from 0, farthest first; equal ones in the order of reading."""
    n = len(grid)
    order = np.argsort(-sign * grid, axis=None, kind="stable")[:SHOWN_CELLS]
    found = [(int(at) // n + 1, int(at) % n + 1, float(grid.flat[at])) for at in order]
    return [
        CellItem(row=row, column=column, value=value, text=f"row {row}, column {column} of {n}")
        for row, column, value in found
        if sign * value > 0
    ]


def _neighbor(match: Match | None) -> NeighborItem | None:
    if match is None:
        return None
    exemplar = match.exemplar
    return NeighborItem(
        id=match.neighbor.id,
        pool=match.neighbor.pool,
        label=exemplar.label,
        similarity=match.neighbor.similarity,
        source=exemplar.source,
        metadata=dict(exemplar.metadata),
    )
