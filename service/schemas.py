"""Conversions from the values of the service to what goes over the wire (`service.wire`)."""

from typing import Any, Literal

from indexer.live.view import View
from perception.policy_file import CalibratedPolicy, FlipRate
from perception.verdict import DecisionPolicy
from service.classifier import Classification, Lookup, Match
from service.decoding import PreparedImage
from service.wire import (
    ClassifyItem,
    Collection,
    DecidingFrame,
    FlipRateItem,
    Image,
    NeighborItem,
    Policy,
    Problem,
    SimilarItem,
    SnapshotVersion,
    SuppressedItem,
)


def snapshot_version(snapshot: View) -> SnapshotVersion:
    """Which published version was searched."""
    return SnapshotVersion(
        collection=snapshot.collection,
        version=snapshot.version,
        revision=snapshot.revision,
        created_at=snapshot.created_at,
    )


def described_policy(policy: DecisionPolicy, calibrated: CalibratedPolicy | None) -> Policy:
    """A policy, and the file that it is from."""
    return Policy(
        version=policy.version,
        rule=policy.rule,
        k=policy.k,
        min_similarity=policy.min_similarity,
        min_margin=policy.min_margin,
        min_margin_unsafe=policy.min_margin_unsafe,
        name=calibrated.name if calibrated else None,
        sha256=calibrated.sha256 if calibrated else None,
        audited_gallery=calibrated.gallery_sha256 if calibrated else None,
    )


def classify_item(id: str, found: Classification, calibrated: CalibratedPolicy | None) -> ClassifyItem:
    """The answer to one image of /classify, from its classification and the calibrated policy that made it."""
    rates: tuple[FlipRate, ...] = ()
    # Audits are of single frames: the margin of the deciding one says little of what the others would take to flip.
    if calibrated is not None and len(found.image.frames) == 1:
        rates = calibrated.flip_rates(found.verdict.label, found.verdict.margin)
    return ClassifyItem(
        id=id,
        verdict=found.verdict.label,
        pool=found.verdict.pool,
        margin=found.verdict.margin,
        reason=found.verdict.reason,
        frame=_frame(found),
        image=_image(found.image),
        neighbors=[_neighbor(match) for match in found.matches],
        suppressed=[
            SuppressedItem(id=item.exemplar_id, by=item.by, similarity=item.similarity_to_item)
            for item in found.suppressed
        ],
        flip_rate_at_eps=[_flip_rate(rate) for rate in rates] or None,
        certified_radius_l2=found.certified_radius_l2,
    )


def coarse_classify_item(id: str, found: Classification) -> ClassifyItem:
    """The same without what tells a prober how near an image is to another verdict: the verdict alone."""
    return ClassifyItem(
        id=id,
        detail="coarse",
        verdict=found.verdict.label,
        pool=None,
        margin=None,
        reason="coarse answer: this caller sent many near-duplicates of this image",
        frame=_frame(found),
        image=_image(found.image),
        neighbors=[],
        flip_rate_at_eps=None,
        certified_radius_l2=None,
    )


def similar_item(id: str, found: Lookup, min_similarity: float) -> SimilarItem:
    """The answer to one image or prompt of /similar, without what is less similar than `min_similarity`."""
    neighbors = [_neighbor(match) for match in found.matches]
    return _similar_item(id, "full", found, neighbors, min_similarity)


def coarse_similar_item(id: str, found: Lookup, min_similarity: float) -> SimilarItem:
    """The same with similarities of one decimal.

    `min_similarity` is compared with the rounded ones: else asking with many of them would find out the others.
    """
    exact = [_neighbor(match) for match in found.matches]
    rounded = [item.model_copy(update={"similarity": round(item.similarity, 1)}) for item in exact]
    return _similar_item(id, "coarse", found, rounded, min_similarity)


def described_collection(snapshot: View) -> Collection:
    """A published collection, as /pools lists it."""
    return Collection(
        name=snapshot.collection,
        kind=snapshot.kind,
        version=snapshot.version,
        revision=snapshot.revision,
        created_at=snapshot.created_at,
        counts=snapshot.counts,
    )


def problem_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's description of the problems that a route can answer with."""
    return {status: {"model": Problem} for status in statuses}


def _similar_item(
    id: str, detail: Literal["full", "coarse"], found: Lookup, neighbors: list[NeighborItem], min_similarity: float
) -> SimilarItem:
    near = [item for item in neighbors if item.similarity >= min_similarity]
    return SimilarItem(id=id, detail=detail, image=_image(found.image) if found.image else None, neighbors=near)


def _frame(found: Classification) -> DecidingFrame:
    return DecidingFrame(
        index=found.frame.index, background=found.frame.background, frames_examined=len(found.image.frames)
    )


def _image(image: PreparedImage) -> Image:
    return Image(
        format=image.format,
        width_px=image.width_px,
        height_px=image.height_px,
        frames_in_file=image.frames_in_file,
    )


def _neighbor(match: Match) -> NeighborItem:
    return NeighborItem(
        id=match.neighbor.id,
        pool=match.neighbor.pool,
        label=match.exemplar.label,
        similarity=match.neighbor.similarity,
        source=match.exemplar.source,
        metadata=dict(match.exemplar.metadata),
    )


def _flip_rate(rate: FlipRate) -> FlipRateItem:
    return FlipRateItem(
        norm=rate.norm, eps=rate.eps, steps=rate.steps, value=rate.value, interval95=rate.interval95, n=rate.n
    )
