"""Traces: a request with its stages, under the caller's trace, without anything that the caller has sent."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from perception.testing import ToyEncoder, encoded, synthetic_image
from service.app import create_app
from service.errors import SettingsError
from service.request_log import RequestLog
from service.startup import load
from service.testing import publish, toy_pools, toy_settings
from service.trace_export import DiscreetExporter
from service.tracing import configure_tracing, current_trace_id, flush_tracing, past_span, span, telemetry_config

ROOT = Path(__file__).parents[2]
ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE_ID}-{PARENT_ID}-01"


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """What would be sent. The provider can be set once a process, so it is put in place and taken away by hand."""
    received = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(DiscreetExporter(received)))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    return received


def small_app() -> FastAPI:
    app = FastAPI(telemetry=telemetry_config())
    app.add_middleware(RequestLog)

    @app.get("/look/{name}")
    async def look(name: str) -> dict[str, str | None]:
        with span("decode", frames=3):
            pass
        now_ns = time.time_ns()
        past_span("encode", now_ns - 2_000_000, now_ns - 1_000_000, batch=8)
        return {"trace_id": current_trace_id()}

    @app.get("/livez")
    async def livez() -> None:
        with span("decide"):
            pass

    @app.get("/fails")
    async def fails() -> None:
        with span("search"):
            raise ValueError("a secret prompt")

    return app


def by_name(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {found.name: found for found in exporter.get_finished_spans()}


def words(found: ReadableSpan) -> str:
    """All that a span says, resource and times aside."""
    return repr((found.name, dict(found.attributes or {}), found.events, found.links, found.status.description))


def parent_id(found: ReadableSpan) -> int | None:
    return None if found.parent is None else found.parent.span_id


def test_stages_are_children_of_the_request_and_it_of_the_caller(exporter: InMemorySpanExporter) -> None:
    with TestClient(small_app()) as client:
        answer = client.get("/look/x", headers={"traceparent": TRACEPARENT})
    assert answer.json() == {"trace_id": TRACE_ID}
    spans = by_name(exporter)
    assert set(spans) == {"GET /look/{name}", "decode", "encode"}
    request = spans["GET /look/{name}"]
    assert request.context is not None
    assert request.context.trace_id == int(TRACE_ID, 16)
    assert parent_id(request) == int(PARENT_ID, 16)
    assert parent_id(spans["decode"]) == parent_id(spans["encode"]) == request.context.span_id
    assert dict(spans["decode"].attributes or {}) == {"hardlook.frames": 3}
    encode = spans["encode"]
    assert encode.start_time is not None
    assert encode.end_time is not None
    assert encode.end_time - encode.start_time == 1_000_000


def test_no_span_holds_what_a_caller_sent(exporter: InMemorySpanExporter) -> None:
    headers = {
        "authorization": "Bearer secret",
        "host": "secret.example",
        "user-agent": "secret",
        "baggage": "secret=1",
    }
    with TestClient(small_app(), raise_server_exceptions=False) as client:
        for path in ("/look/secret?text=secret", "/fails?text=secret", "/secret"):
            client.get(path, headers=headers)
        client.request("SECRET", "/look/secret")
    spans = exporter.get_finished_spans()
    assert len(spans) == 7
    assert [words(found) for found in spans if "secret" in words(found).lower()] == []
    assert by_name(exporter)["search"].attributes == {"error.type": "ValueError"}
    assert by_name(exporter)["search"].status.status_code is trace.StatusCode.ERROR
    allowed = {"http.request.method", "http.response.status_code", "http.route", "url.scheme", "error.type"}
    allowed |= {"network.protocol.version", "hardlook.frames", "hardlook.batch"}
    assert {name for found in spans for name in found.attributes or {}} <= allowed


def test_probes_are_not_traced(exporter: InMemorySpanExporter) -> None:
    with TestClient(small_app()) as client:
        assert client.get("/livez").status_code == 200
    assert exporter.get_finished_spans() == ()


def test_outside_of_a_request_there_is_no_span(exporter: InMemorySpanExporter) -> None:
    with span("decode"):
        past_span("encode", 1, 2)
    assert exporter.get_finished_spans() == ()
    assert current_trace_id() is None


def test_what_the_caller_does_not_sample_is_not_sent(exporter: InMemorySpanExporter) -> None:
    with TestClient(small_app()) as client:
        client.get("/look/x", headers={"traceparent": TRACEPARENT.removesuffix("01") + "00"})
    assert exporter.get_finished_spans() == ()


def test_the_service_traces_a_classification(exporter: InMemorySpanExporter, tmp_path: Path) -> None:
    encoder = ToyEncoder()
    publish(tmp_path, encoder, toy_pools(per_pool=1))
    settings = toy_settings(tmp_path)
    with TestClient(create_app(settings, load(settings, encoder))) as client:
        headers = {"traceparent": TRACEPARENT, "content-type": "image/png"}
        assert client.post("/classify?k=1", content=encoded(synthetic_image(0)), headers=headers).status_code == 200
    spans = by_name(exporter)
    assert {"POST /classify", "decode", "decide"} <= set(spans)
    assert {found.context.trace_id for found in spans.values() if found.context} == {int(TRACE_ID, 16)}
    assert not [found for found in spans.values() if "k=1" in words(found)]


# --- asking for it ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {ENDPOINT: ""},
        {ENDPOINT: "http://127.0.0.1:4318", "OTEL_SDK_DISABLED": "true"},
        {ENDPOINT: "http://127.0.0.1:4318", "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_unasked_nothing_happens(environment: dict[str, str]) -> None:
    before = trace.get_tracer_provider()
    assert configure_tracing(environment) == ""
    assert trace.get_tracer_provider() is before
    flush_tracing()  # nothing to do


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({ENDPOINT: "collector:4318"}, ENDPOINT),
        ({ENDPOINT: "ftp://user:hunter2@collector"}, ENDPOINT),
        ({ENDPOINT: "http://[hunter2"}, ENDPOINT),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://"}, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"),
        ({ENDPOINT: "http://c:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "'grpc'"),
        ({ENDPOINT: "http://c:4318", "OTEL_TRACES_EXPORTER": "zipkin"}, "'zipkin'"),
    ],
)
def test_what_cannot_be_done_is_refused(environment: dict[str, str], named: str) -> None:
    before = trace.get_tracer_provider()
    with pytest.raises(SettingsError) as raised:
        configure_tracing(environment)
    assert named in str(raised.value)
    assert "hunter2" not in str(raised.value)
    assert trace.get_tracer_provider() is before


def run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process of its own: what was imported and which provider is set cannot be taken back."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "HARDLOOK_"))}
    command = [sys.executable, "-c", script]
    found = subprocess.run(
        command, cwd=ROOT, env={**inherited, **environment}, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    return found


def test_unasked_the_sdk_is_not_imported() -> None:
    script = """
import os, sys
from service.tracing import configure_tracing
configure_tracing(os.environ)
print("opentelemetry.sdk" in sys.modules)
"""
    assert run(script).stdout == "False\n"


def test_asked_for_but_not_installed_is_said() -> None:
    script = """
import os, sys
sys.modules["opentelemetry.sdk"] = None  # as if it were not there
from service.errors import SettingsError
from service.tracing import configure_tracing
try:
    configure_tracing(os.environ)
except SettingsError as error:
    print(error)
"""
    said = run(script, **{ENDPOINT: "http://127.0.0.1:4318"}).stdout
    assert ENDPOINT in said
    assert "hardlook[otel]" in said


# --- sending ---------------------------------------------------------------------------------------------------------


class Collector:
    """A receiver of traces on loopback."""

    def __init__(self) -> None:
        self.received: list[ExportTraceServiceRequest] = []
        received = self.received

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                received.append(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def collector() -> Iterator[Collector]:
    found = Collector()
    thread = threading.Thread(target=found.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield found
    found.server.shutdown()
    thread.join()
    found.server.server_close()


SERVED = """
import os
from fastapi import FastAPI
from fastapi.testclient import TestClient
from service.tracing import configure_tracing, flush_tracing, span, telemetry_config

print(configure_tracing(os.environ))
app = FastAPI(telemetry=telemetry_config())

@app.get("/look")
def look():
    with span("decode"):
        pass

with TestClient(app) as client:
    client.get("/look?text=secret")
flush_tracing()
os._exit(0)  # as a signal ends the process: nothing else is sent
"""


def test_what_is_asked_for_arrives_before_the_end(collector: Collector) -> None:
    done = run(
        SERVED,
        OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=f"{collector.url}/v1/traces",
        OTEL_RESOURCE_ATTRIBUTES="deployment.environment=test",
        FASTAPI_OTEL_AUTO_CONFIGURE="true",  # would send everything, paths and queries too
        NO_PROXY="*",
    )
    assert done.stdout == "127.0.0.1\n"
    resources = [resource for request in collector.received for resource in request.resource_spans]
    attributes = {item.key: item.value.string_value for item in resources[0].resource.attributes}
    assert attributes["service.name"] == "hardlook"
    assert attributes["service.version"]
    assert attributes["deployment.environment"] == "test"
    sent = [found for resource in resources for scope in resource.scope_spans for found in scope.spans]
    assert sorted(found.name for found in sent) == ["GET /look", "decode"]
    assert b"secret" not in b"".join(request.SerializeToString() for request in collector.received)


def test_the_operator_names_the_service(collector: Collector) -> None:
    run(SERVED, **{ENDPOINT: collector.url, "OTEL_SERVICE_NAME": "moderation", "NO_PROXY": "*"})
    [resource, *_] = [resource for request in collector.received for resource in request.resource_spans]
    assert {item.key: item.value.string_value for item in resource.resource.attributes}["service.name"] == "moderation"


def test_a_receiver_that_hangs_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    class Stuck(TracerProvider):
        def force_flush(self, timeout_millis: int | None = None) -> bool:
            return release.wait()

    monkeypatch.setattr(trace, "_TRACER_PROVIDER", Stuck(shutdown_on_exit=False))
    started_s = time.monotonic()
    flush_tracing(timeout_s=0.05)
    release.set()
    assert time.monotonic() - started_s < 5
