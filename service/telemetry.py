"""Metrics: what an application counts and measures about itself, for Prometheus.

Owns names, labels and buckets; docs/operations.md explains each, docker/prometheus/ and docker/grafana/ build on them.
Knows nothing of HTTP or of the encoder. All methods may be called from any thread.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from typing import Literal, get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
)
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

Stage = Literal["body", "fetch", "decode", "queue", "encode", "search", "decide"]
Disagreement = Literal["frames", "backgrounds", "neighbors"]
State = Literal["starting", "ready", "draining", "broken"]
# Name, version, time of publishing, and exemplars by label.
SnapshotState = tuple[str, str, datetime, Mapping[str, int]]

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_STAGE_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_REQUEST_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_MARGIN = (0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1)
_BATCH = (1, 2, 4, 8, 16, 32, 64, 128)
# Galleries may have as many labels as exemplars; a time series for each would burden every scrape.
_MAX_LABELS = 16


class Metrics:
    """All metrics of one application, in a registry of its own: several applications in a process stay apart."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "hardlook_requests_total", "Requests answered.", ["route", "method", "status"], registry=registry
        )
        self._request_s = Histogram(
            "hardlook_request_duration_seconds",
            "Seconds from the head of a request to the end of its answer.",
            ["route", "method"],
            buckets=_REQUEST_S,
            registry=registry,
        )
        self._problems = Counter(
            "hardlook_problems_total", "Answers that were a problem, by the last part of its type.", ["type"],
            registry=registry,
        )  # fmt: skip
        stages = Histogram(
            "hardlook_stage_duration_seconds",
            "Seconds in one stage of answering: of a batch for encode and search, else of an image or a body.",
            ["stage"],
            buckets=_STAGE_S,
            registry=registry,
        )
        self._stages = {name: stages.labels(name) for name in get_args(Stage)}
        self._define_verdicts()
        self._define_work()
        self._define_changes()
        self._snapshots = _Snapshots()
        registry.register(self._snapshots)
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)

    def _define_verdicts(self) -> None:
        registry = self._registry
        self._judged = Counter("hardlook_images_judged_total", "Images that got a verdict.", registry=registry)
        self._verdicts = Counter(
            "hardlook_verdicts_total", "Verdicts, by the pool that won.", ["verdict", "pool"], registry=registry
        )
        self._margins = Histogram(
            "hardlook_margin",
            "Cosine similarity by which the winning pool is ahead of the others; 0 or less where it is not.",
            ["verdict"],
            buckets=_MARGIN,
            registry=registry,
        )
        disagreements = Counter(
            "hardlook_disagreements_total",
            "Images whose frames, whose two backgrounds, or whose nearest exemplars do not agree.",
            ["kind"],
            registry=registry,
        )
        self._disagreements = {kind: disagreements.labels(kind) for kind in get_args(Disagreement)}
        self._coarse = Counter(
            "hardlook_coarse_answers_total", "Answers that were made coarse for a caller who probes.", registry=registry
        )

    def _define_work(self) -> None:
        registry = self._registry
        self._batch_size = Histogram(
            "hardlook_batch_size", "Frames and texts in one batch of the encoder.", buckets=_BATCH, registry=registry
        )
        self._batch_s = Histogram(
            "hardlook_batch_duration_seconds", "Seconds of one batch: encode and search.", buckets=_STAGE_S,
            registry=registry,
        )  # fmt: skip
        self._replaced = Counter(
            "hardlook_decoders_replaced_total", "Decoding processes that were replaced.", ["reason"], registry=registry
        )
        self._fetches = Counter(
            "hardlook_fetches_total", "Images fetched from a URL, by outcome.", ["outcome"], registry=registry
        )
        self._depth = Gauge("hardlook_queue_depth", "Entries in a bounded queue now.", ["queue"], registry=registry)
        self._limit = Gauge("hardlook_queue_limit", "Entries that a queue has room for.", ["queue"], registry=registry)
        self._state = Gauge("hardlook_state", "1 for the state that the service is in.", ["state"], registry=registry)
        self._build = Info("hardlook_build", "What is running.", registry=registry)

    def _define_changes(self) -> None:
        registry = self._registry
        self._recorded = Counter(
            "hardlook_decisions_recorded_total", "Verdicts on their way into the audit log.", ["outcome"],
            registry=registry,
        )  # fmt: skip
        self._shadowed = Counter(
            "hardlook_shadow_total",
            "Images that a candidate judged too: whether it agrees, or what it would have answered.",
            ["candidate", "outcome"],
            registry=registry,
        )
        self._webhooks = Counter(
            "hardlook_webhook_attempts_total", "Attempts to deliver a message.", ["hook", "result"], registry=registry
        )
        self._quarantined = Counter(
            "hardlook_quarantined_total", "Exemplars that were taken out for matching too much.", registry=registry
        )
        self._kept_images = Counter(
            "hardlook_kept_images_total", "Small pictures of images, by what became of them.", ["outcome"],
            registry=registry,
        )  # fmt: skip
        self._revision = Gauge(
            "hardlook_catalog_revision", "Number of the last change that is seen here.", registry=registry
        )
        self._waiting = Gauge(
            "hardlook_waiting", "What waits for the catalogue, or to be delivered.", ["what"], registry=registry
        )

    def render(self, accept: str | None = None) -> tuple[bytes, str]:
        """All metrics, and their content type.

        Args:
            accept: header of the request; Prometheus' text format where it asks for nothing else.
        """
        encode, content_type = choose_encoder(accept or "")
        return encode(_WithoutCreated(self._registry)), content_type

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count a request.

        Args:
            route: template of the route, 'unmatched' where there is none; never the path.
            method: as the request has it; those that no route has are counted together.
            status: of HTTP; 499 where the caller hung up.
            seconds: until its end.
        """
        method = method if method in _METHODS else "other"
        self._requests.labels(route, method, str(status)).inc()
        self._request_s.labels(route, method).observe(seconds)

    def problem(self, slug: str) -> None:
        """Count a problem by the last part of its type, which must be one of `service.problems`."""
        self._problems.labels(slug).inc()

    @contextmanager
    def stage(self, name: Stage) -> Iterator[None]:
        """Measure a stage, whether it succeeds or not."""
        started_s = time.perf_counter()
        try:
            yield
        finally:
            self.stage_seconds(name, time.perf_counter() - started_s)

    def stage_seconds(self, name: Stage, seconds: float) -> None:
        """Record a stage that was measured elsewhere."""
        self._stages[name].observe(seconds)

    def verdict(self, label: str, pool: str | None, margin: float | None) -> None:
        """Count an image that was judged.

        Args:
            label: of the verdict.
            pool: that won, None where there was none.
            margin: cosine in [-2, 2], None where no other pool had a neighbour.
        """
        self._judged.inc()
        self._verdicts.labels(str(label), str(pool or "none")).inc()
        if margin is not None and math.isfinite(margin):  # one NaN would spoil the sum for good
            self._margins.labels(str(label)).observe(margin)

    def disagreement(self, kind: Disagreement) -> None:
        """Count an image in which the evidence contradicts itself.

        Args:
            kind: 'frames' of one animation, the two 'backgrounds' of one frame, or the nearest of the 'neighbors'
                against the majority of those shown.
        """
        self._disagreements[kind].inc()

    def coarse_answer(self) -> None:
        """Count an answer without figures, to a caller who seems to probe."""
        self._coarse.inc()

    def batch(self, size: int, seconds: float) -> None:
        """Record a batch of the encoder."""
        self._batch_size.observe(size)
        self._batch_s.observe(seconds)

    def decoder_replaced(self, reason: str) -> None:
        """Count a decoding process that was replaced; `reason` is one of the few of `service.decoding`."""
        self._replaced.labels(reason).inc()

    def fetched(self, outcome: Literal["ok", "disabled", "refused", "failed", "timeout"]) -> None:
        """Count an image that was fetched from a URL, or was not."""
        self._fetches.labels(outcome).inc()

    def recorded(self, outcome: str, n: int) -> None:
        """Count verdicts by what became of them; outcomes are those of `service.recording`."""
        self._recorded.labels(outcome).inc(n)

    def shadowed(self, candidate: str, outcome: str) -> None:
        """Count an image that a candidate judged; outcomes are those of `service.shadow`."""
        self._shadowed.labels(candidate, outcome).inc()

    def webhook(self, hook: str, result: str) -> None:
        """Count an attempt to deliver a message; results are those of `service.webhooks`."""
        self._webhooks.labels(hook, result).inc()

    def quarantined(self) -> None:
        """Count an exemplar that the flood guard took out of searches."""
        self._quarantined.inc()

    def kept_images(self, outcome: str, n: int) -> None:
        """Count pictures by what became of them; outcomes are those of `service.image_keeping`."""
        self._kept_images.labels(outcome).inc(n)

    def watch_catalog(self, revision: Callable[[], int], waiting: Mapping[str, Callable[[], int]]) -> None:
        """Show how far the catalogue is, and what waits for it, asked for at each scrape."""
        self._revision.set_function(revision)
        for what, depth in waiting.items():
            self._waiting.labels(what).set_function(depth)

    def watch_queue(self, name: str, depth: Callable[[], int], limit: int) -> None:
        """Show the depth of a queue, asked for at each scrape."""
        self._depth.labels(name).set_function(depth)
        self._limit.labels(name).set(limit)

    def watch_snapshots(self, snapshots: Callable[[], Iterable[SnapshotState]]) -> None:
        """Show the served snapshots, asked for at each scrape, so that what is no longer served disappears.

        Args:
            snapshots: collection, version, time of publishing (with its zone) and exemplars by label of each.
        """
        self._snapshots.source = snapshots

    def watch_state(self, state: Callable[[], State]) -> None:
        """Show the state of the service, asked for at each scrape."""
        for name in get_args(State):
            self._state.labels(name).set_function(partial(_is, state, name))

    def build_info(self, version: str, model: str, fingerprint: str, precision: str, policy: str) -> None:
        """Show what is running: hardlook's version, the encoder, and the version of the policy."""
        self._build.info(
            {"version": version, "model": model, "fingerprint": fingerprint, "precision": precision, "policy": policy}
        )


def _is(state: Callable[[], State], name: State) -> float:
    return float(state() == name)


class _Snapshots(Collector):
    """Series of the snapshots that are served at the moment of the scrape."""

    def __init__(self) -> None:
        self.source: Callable[[], Iterable[SnapshotState]] = tuple

    def collect(self) -> Iterable[Metric]:
        age = GaugeMetricFamily(
            "hardlook_snapshot_age_seconds", "Seconds since the served snapshot was published.", labels=["collection"]
        )
        info = InfoMetricFamily("hardlook_snapshot", "The version that is served.", labels=["collection"])
        exemplars = GaugeMetricFamily(
            "hardlook_exemplars",
            f"Exemplars in the served snapshot; one series labelled 'all' where it has over {_MAX_LABELS} labels.",
            labels=["collection", "label"],
        )
        now = datetime.now(UTC)
        for collection, version, created_at, counts in self.source():
            age.add_metric([collection], max(0.0, (now - created_at).total_seconds()))
            info.add_metric([collection], {"version": version})
            for label, count in (counts if len(counts) <= _MAX_LABELS else {"all": sum(counts.values())}).items():
                exemplars.add_metric([collection, str(label)], count)
        return age, info, exemplars


class _WithoutCreated(Collector):
    """A registry without the time at which each series began, which would add half as many series again."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric
