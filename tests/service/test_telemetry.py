"""Metrics: what is counted appears under its name, apart for each application, from any thread."""

import math
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from service.telemetry import Disagreement, Metrics, Stage


def samples(metrics: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample by its name and labels."""
    body, _ = metrics.render()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in parse_text(body.decode())
        for sample in family.samples
    }


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return samples(metrics).get((name, frozenset(labels.items())))


def test_requests_are_counted_by_route_method_and_status() -> None:
    metrics = Metrics()
    metrics.request("/classify", "POST", 200, 0.02)
    metrics.request("/classify", "POST", 200, 0.04)
    metrics.request("unmatched", "BREW", 404, 0.0)
    assert value(metrics, "hardlook_requests_total", route="/classify", method="POST", status="200") == 2
    assert value(metrics, "hardlook_requests_total", route="unmatched", method="other", status="404") == 1
    seconds = value(metrics, "hardlook_request_duration_seconds_sum", route="/classify", method="POST")
    assert seconds == pytest.approx(0.06)
    below = value(metrics, "hardlook_request_duration_seconds_bucket", route="/classify", method="POST", le="0.025")
    assert below == 1


@given(st.lists(st.text(max_size=20), min_size=1, max_size=50))
def test_methods_make_a_bounded_number_of_series(methods: list[str]) -> None:
    metrics = Metrics()
    for method in methods:
        metrics.request("unmatched", method, 405, 0.0)
    counted = {labels for name, labels in samples(metrics) if name == "hardlook_requests_total"}
    assert len(counted) <= 8
    assert all(dict(labels)["method"] in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "other")
               for labels in counted)  # fmt: skip


def test_applications_in_one_process_stay_apart() -> None:
    one, other = Metrics(), Metrics()
    one.verdict("safe", "safe", 0.2)
    assert value(one, "hardlook_images_judged_total") == 1
    assert value(other, "hardlook_images_judged_total") == 0


@pytest.mark.parametrize("name", get_args(Stage))
def test_stages_are_measured_also_where_they_fail(name: Stage) -> None:
    metrics = Metrics()
    assert value(metrics, "hardlook_stage_duration_seconds_count", stage=name) == 0  # there from the start
    with pytest.raises(ValueError, match="inside"), metrics.stage(name):
        raise ValueError("inside")
    with metrics.stage(name):
        pass
    metrics.stage_seconds(name, 2.0)
    assert value(metrics, "hardlook_stage_duration_seconds_count", stage=name) == 3
    total = value(metrics, "hardlook_stage_duration_seconds_sum", stage=name)
    assert total is not None
    assert 2 <= total < 3


def test_verdicts_and_their_margins() -> None:
    metrics = Metrics()
    metrics.verdict("safe", "safe", 0.015)
    metrics.verdict("review", None, None)
    metrics.verdict("unsafe", "unsafe", -0.1)
    metrics.verdict("unsafe", "unsafe", math.nan)
    assert value(metrics, "hardlook_images_judged_total") == 4
    assert value(metrics, "hardlook_verdicts_total", verdict="safe", pool="safe") == 1
    assert value(metrics, "hardlook_verdicts_total", verdict="review", pool="none") == 1
    assert value(metrics, "hardlook_verdicts_total", verdict="unsafe", pool="unsafe") == 2
    assert value(metrics, "hardlook_margin_bucket", verdict="safe", le="0.01") == 0
    assert value(metrics, "hardlook_margin_bucket", verdict="safe", le="0.02") == 1
    assert value(metrics, "hardlook_margin_bucket", verdict="unsafe", le="0.0") == 1
    assert value(metrics, "hardlook_margin_sum", verdict="unsafe") == pytest.approx(-0.1)  # and not NaN
    assert value(metrics, "hardlook_margin_count", verdict="review") is None


@pytest.mark.parametrize(
    ("tell", "name", "labels"),
    [
        *[
            (lambda metrics, kind=kind: metrics.disagreement(kind), "hardlook_disagreements_total", {"kind": kind})
            for kind in get_args(Disagreement)
        ],
        (lambda metrics: metrics.problem("overloaded"), "hardlook_problems_total", {"type": "overloaded"}),
        (lambda metrics: metrics.coarse_answer(), "hardlook_coarse_answers_total", {}),
        (lambda metrics: metrics.decoder_replaced("died"), "hardlook_decoders_replaced_total", {"reason": "died"}),
        (lambda metrics: metrics.fetched("refused"), "hardlook_fetches_total", {"outcome": "refused"}),
        (lambda metrics: metrics.batch(3, 0.1), "hardlook_batch_size_count", {}),
        (lambda metrics: metrics.batch(3, 0.1), "hardlook_batch_duration_seconds_count", {}),
    ],
)
def test_each_call_counts_one(tell: Callable[[Metrics], None], name: str, labels: dict[str, str]) -> None:
    metrics = Metrics()
    before = value(metrics, name, **labels) or 0
    tell(metrics)
    assert value(metrics, name, **labels) == before + 1


def test_queues_are_asked_at_each_scrape() -> None:
    metrics, waiting = Metrics(), [1]
    metrics.watch_queue("encoder", lambda: waiting[0], 256)
    assert value(metrics, "hardlook_queue_depth", queue="encoder") == 1
    waiting[0] = 7
    assert value(metrics, "hardlook_queue_depth", queue="encoder") == 7
    assert value(metrics, "hardlook_queue_limit", queue="encoder") == 256


def test_one_state_at_a_time() -> None:
    metrics = Metrics()
    for state in ("starting", "ready", "draining", "broken"):
        metrics.watch_state(lambda state=state: state)  # type: ignore[misc]
        found = {
            dict(labels)["state"]: on for (name, labels), on in samples(metrics).items() if name == "hardlook_state"
        }
        assert found == {"starting": 0, "ready": 0, "draining": 0, "broken": 0, state: 1}


def test_snapshots_follow_what_is_served() -> None:
    metrics = Metrics()
    hour_ago = datetime.now(UTC) - timedelta(hours=1)
    served = [("pools", "v1", hour_ago, {"safe": 3, "unsafe": 2})]
    metrics.watch_snapshots(lambda: served)
    age = value(metrics, "hardlook_snapshot_age_seconds", collection="pools")
    assert age is not None
    assert 3600 <= age < 3660
    assert value(metrics, "hardlook_snapshot_info", collection="pools", version="v1") == 1
    assert value(metrics, "hardlook_exemplars", collection="pools", label="unsafe") == 2
    served[:] = [("pools", "v2", datetime.now(UTC) + timedelta(hours=1), {"safe": 4})]
    assert value(metrics, "hardlook_snapshot_info", collection="pools", version="v1") is None
    assert value(metrics, "hardlook_snapshot_age_seconds", collection="pools") == 0  # clocks may differ


def test_a_gallery_of_many_labels_is_one_series() -> None:
    metrics = Metrics()
    counts = {f"label-{i}": i for i in range(1000)}
    metrics.watch_snapshots(lambda: [("gallery", "v", datetime.now(UTC), counts)])
    found = {labels: count for (name, labels), count in samples(metrics).items() if name == "hardlook_exemplars"}
    assert found == {frozenset({("collection", "gallery"), ("label", "all")}): sum(range(1000))}


def test_build_info_escapes_what_it_shows() -> None:
    metrics = Metrics()
    metrics.build_info(version="1", model='a"b\nc\\', fingerprint="f", precision="fp32", policy="nearest-1")
    shown = {"version": "1", "model": 'a"b\nc\\', "fingerprint": "f", "precision": "fp32", "policy": "nearest-1"}
    assert value(metrics, "hardlook_build_info", **shown) == 1


def test_threads_lose_no_count() -> None:
    metrics, threads, each = Metrics(), 8, 500
    together = threading.Barrier(threads)

    def work() -> None:
        together.wait()
        for _ in range(each):
            with metrics.stage("encode"):
                metrics.verdict("safe", "safe", 0.1)

    running = [threading.Thread(target=work) for _ in range(threads)]
    for thread in running:
        thread.start()
    for _ in range(10):
        metrics.render()  # a scrape in between disturbs nobody
    for thread in running:
        thread.join()
    assert value(metrics, "hardlook_stage_duration_seconds_count", stage="encode") == threads * each
    assert value(metrics, "hardlook_verdicts_total", verdict="safe", pool="safe") == threads * each


def test_the_format_that_is_asked_for() -> None:
    metrics = Metrics()
    metrics.coarse_answer()
    body, content_type = metrics.render()
    assert content_type.startswith("text/plain; version=0.0.4")
    body, content_type = metrics.render("application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text; version=1.0.0")
    assert body.endswith(b"# EOF\n")
    families = list(parse_openmetrics(body.decode()))  # type: ignore[no-untyped-call]
    names = {sample.name for family in families for sample in family.samples}
    assert "hardlook_coarse_answers_total" in names
    assert not [name for name in names if name.endswith("_created")]


def test_names_and_units_follow_the_conventions() -> None:
    body, _ = Metrics().render()
    families = [family for family in parse_text(body.decode()) if family.name.startswith("hardlook_")]
    assert len(families) >= 20
    for family in families:
        assert family.documentation.endswith("."), family.name
        # The parser names a counter without its ending.
        assert (f"# TYPE {family.name}_total counter" in body.decode()) == (family.type == "counter"), family.name
        if family.name.endswith("_seconds"):
            assert "econds" in family.documentation, family.name
    assert {"process_resident_memory_bytes", "process_cpu_seconds_total", "python_info"} <= {
        name for name, _ in samples(Metrics())
    }
