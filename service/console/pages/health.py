"""Health: what runs, how full it is, and what waits. Who may read metrics sees what is counted; others what serves.

Figures are those of /metrics, from the same gauges and counters, and nothing is counted for this page alone.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from fastapi import Request
from fastapi.responses import Response
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import make_url

from indexer.catalog import jobs
from indexer.catalog.clock import now, parse_time, text_of
from service.console.gate import Visit, visit_of
from service.console.labels import labels_in_words
from service.console.rendering import page
from service.console.routes import console_router
from service.recording import LIMIT as MOST_DECISIONS
from service.replicas import devices
from service.runtime import state_of
from service.schemas import described_collection
from service.settings import Settings
from service.startup import product_version
from service.telemetry import Metrics

router = console_router()
WAITING = {
    "changes": "Changes of collections, to be written",
    "decisions": "Verdicts, to be recorded",
    "webhooks": "Messages to webhooks, to be delivered",
    "images": "Small pictures, to be made",
}
QUEUES = {"requests": "Requests in progress", "encoder": "Frames for the encoder", "decoder": "Images for a decoder"}
_MINUTE_S, _HOUR_S, _DAY_S = 60, 3600, 86_400


class Figures:
    """What the metrics say at one moment.

    Args:
        metrics: of the application.
    """

    def __init__(self, metrics: Metrics) -> None:
        text, _ = metrics.render()
        self._samples: dict[str, list[tuple[Mapping[str, str], float]]] = {}
        for family in text_string_to_metric_families(text.decode()):
            for sample in family.samples:
                self._samples.setdefault(sample.name, []).append((sample.labels, sample.value))

    def by(self, name: str, label: str) -> dict[str, int]:
        """Values of a metric, those of one value of a label added up; those that are not 0, and all of gauges."""
        found: dict[str, int] = {}
        for labels, value in self._samples.get(name, ()):
            found[labels[label]] = found.get(labels[label], 0) + int(value)
        return found

    def one(self, name: str) -> float | None:
        """The value of a metric without labels; None where there is none yet."""
        found = self._samples.get(name, ())
        return found[0][1] if found else None


@dataclass(frozen=True)
class Bounded:
    """Something that fills.

    Attributes:
        name: in words.
        depth: how much there is now.
        limit: the most; None where there is none.
    """

    name: str
    depth: int
    limit: int | None


@router.get("/console/health")
async def health(request: Request) -> Response:
    """Everything in order?"""
    async with visit_of(request) as visit:
        runtime = visit.runtime
        views = runtime.published.snapshots
        shadows = None
        if visit.may("pools:write") and runtime.books is not None:
            shadows = (await visit.client.shadow.show()).candidates
        reviews = None
        if visit.may("review") and runtime.books is not None:
            reviews = await visit.client.reviews.counts()
        return page(
            visit,
            "health.html",
            at=text_of(now()),
            state=state_of(request.app),
            version=product_version(),
            model=runtime.model,
            devices=await asyncio.to_thread(devices, runtime.settings),
            policy=runtime.policy,
            collections=[(described_collection(views[name]), _age_s(views[name].created_at)) for name in sorted(views)],
            words_of=_in_words,
            labels_of=labels_in_words,
            catalog=_catalog(runtime.settings),
            settings=runtime.settings,
            shadows=shadows,
            reviews=reviews,
            figures=await _figures(visit) if visit.may("metrics") else None,
            sees_more=visit.may("metrics", "pools:write", "review"),
        )


async def _figures(visit: Visit) -> dict[str, object]:
    """What only those see who may read metrics."""
    runtime = visit.runtime
    figures = await asyncio.to_thread(Figures, runtime.metrics)
    depths, limits = figures.by("hardlook_queue_depth", "queue"), figures.by("hardlook_queue_limit", "queue")
    queues = [Bounded(words, depths[name], limits.get(name)) for name, words in QUEUES.items() if name in depths]
    most = {"decisions": MOST_DECISIONS}
    waiting = [
        Bounded(WAITING.get(what, what), depth, most.get(what))
        for what, depth in sorted(figures.by("hardlook_waiting", "what").items())
    ]
    editor = runtime.editor
    if editor is not None:
        waiting.append(Bounded("Jobs that wait or run", await editor.read(jobs.open_jobs), runtime.settings.max_jobs))
    started_s = figures.one("process_start_time_seconds")
    return {
        "queues": queues,
        "waiting": waiting,
        "images": runtime.admission.images,
        "replicas": runtime.batcher.working,
        "replaced": figures.by("hardlook_decoders_replaced_total", "reason"),
        "problems": figures.by("hardlook_problems_total", "type"),
        "verdicts": figures.by("hardlook_verdicts_total", "verdict"),
        "recorded": figures.by("hardlook_decisions_recorded_total", "outcome"),
        "kept": figures.by("hardlook_kept_images_total", "outcome"),
        "webhooks": figures.by("hardlook_webhook_attempts_total", "result"),
        "revision": figures.one("hardlook_catalog_revision"),
        "resident_mib": (figures.one("process_resident_memory_bytes") or 0) / 2**20,
        "started": None if started_s is None else text_of(datetime.fromtimestamp(started_s, UTC)),
    }


def _catalog(settings: Settings) -> str | None:
    """Which kind of database has the catalogue, without where it is; None where it is turned off."""
    return None if settings.catalog_url is None else make_url(settings.catalog_url).get_backend_name()


def _age_s(created_at: str) -> int:
    return max(0, int((now() - parse_time(created_at)).total_seconds()))


def _in_words(seconds: int) -> str:
    """A time in its two largest units."""
    days, hours, minutes = seconds // _DAY_S, seconds % _DAY_S // _HOUR_S, seconds % _HOUR_S // _MINUTE_S
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds % _MINUTE_S} s"
