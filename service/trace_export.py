"""Sending traces: the SDK of OpenTelemetry, which is optional; imported only where `service.tracing` is asked to send.

Owns what leaves the process of a span. FastAPI's span of a request holds its path and query, where a prompt may stand:
only attributes that are listed here pass.
"""

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import Status

from service.tracing import ATTRIBUTE_PREFIX

_ALLOWED = frozenset(
    {
        "error.type",
        "http.request.method",
        "http.response.status_code",
        "http.route",
        "network.protocol.version",
        "url.scheme",
    }
)


class DiscreetExporter(SpanExporter):
    """Passes spans on without events, messages, and attributes that are not on the list."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """See `SpanExporter.export`."""
        return self._exporter.export([_discreet(span) for span in spans])

    def shutdown(self) -> None:
        """See `SpanExporter.shutdown`."""
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """See `SpanExporter.force_flush`."""
        return self._exporter.force_flush(timeout_millis)


def _discreet(span: ReadableSpan) -> ReadableSpan:
    attributes = span.attributes or {}
    return ReadableSpan(
        name=span.name,
        context=span.context,
        parent=span.parent,
        resource=span.resource,
        attributes={
            name: value for name, value in attributes.items() if name in _ALLOWED or name.startswith(ATTRIBUTE_PREFIX)
        },
        kind=span.kind,
        status=Status(span.status.status_code),
        start_time=span.start_time,
        end_time=span.end_time,
        instrumentation_scope=span.instrumentation_scope,
    )


def provider() -> TracerProvider:
    """Spans, sent in batches from a thread; `OTEL_*` variables say where to, how often and as which service.

    It does not wait at the end of the process, where the receiver may be gone: `flush_tracing` does, for a time.
    """
    try:
        installed = version("hardlook")
    except PackageNotFoundError:  # run from a checkout that is not installed
        installed = "0"
    resource = Resource.create({"service.name": "hardlook", "service.version": installed})
    traces = TracerProvider(resource=resource.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
    traces.add_span_processor(BatchSpanProcessor(DiscreetExporter(OTLPSpanExporter())))
    return traces
