"""Traces: one for a request, with its stages as spans; sent where the standard OTEL_* variables say, else nowhere.

FastAPI makes the span of a request and takes `traceparent` from it. Owns the spans of stages, and what is left out: no
span holds a path, a query, a prompt, a key or anything of an image (`service.trace_export` lets nothing else pass).
"""

import logging
import threading
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from opentelemetry import trace
from opentelemetry.trace import StatusCode, Tracer, TracerProvider

from service.errors import SettingsError

if TYPE_CHECKING:
    from fastapi.telemetry import TelemetryConfig

Attribute = str | bool | int | float
ATTRIBUTE_PREFIX = "hardlook."
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_PROTOCOL = "http/protobuf"
# Asked for every few seconds, and nothing to learn from.
_NOT_TRACED = frozenset({"/livez", "/healthz", "/readyz", "/startupz", "/metrics"})
_log = logging.getLogger("hardlook.tracing")


def configure_tracing(environment: Mapping[str, str]) -> str:
    """Send traces, for the rest of the process, where the standard variables ask for it.

    Args:
        environment: `os.environ`; names are taken from it, values by the SDK from the same place.

    Returns:
        The host that they go to; empty where nobody asked, and then nothing is imported.

    Raises:
        SettingsError: asked for, but not as it can be done, or the packages are not installed.
    """
    endpoint = next(((name, environment[name]) for name in _ENDPOINTS if environment.get(name)), None)
    kind = environment.get("OTEL_TRACES_EXPORTER", "").strip().lower() or "otlp"
    if endpoint is None or kind == "none" or environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return ""
    host = _host(*endpoint)
    if kind != "otlp":
        raise SettingsError(f"OTEL_TRACES_EXPORTER: {kind[:40]!r} is not supported, only 'otlp' and 'none'")
    protocol = next((environment[name] for name in _PROTOCOLS if environment.get(name)), _PROTOCOL)
    if protocol != _PROTOCOL:
        raise SettingsError(f"{_PROTOCOLS[1]}: {protocol[:40]!r} is not supported, only {_PROTOCOL!r}")
    try:
        from service.trace_export import provider
    except ImportError as error:
        raise SettingsError(
            f"{endpoint[0]} asks for traces, but module {error.name!r} is absent: install hardlook[otel], or unset it"
        ) from error
    trace.set_tracer_provider(provider())
    _log.info("traces are sent to %s", host)
    return host


def _host(name: str, endpoint: str) -> str:
    """Of an endpoint, which may hold a password and so is named in no error."""
    try:
        url = urlsplit(endpoint)
        host = url.hostname
    except ValueError:
        host = None
    if host is None or url.scheme not in ("http", "https"):
        raise SettingsError(f"{name}: not an absolute http or https URL")
    return host


def telemetry_config() -> "TelemetryConfig":
    """What FastAPI is to do: spans of requests and no more; metrics and logs are ours, probes are not traced.

    Its own exporters stay off even where FASTAPI_OTEL_AUTO_CONFIGURE asks for them: they would send URLs.
    """
    return {
        "metrics": False,
        "logs": False,
        "operation_spans": False,
        "auto_configure": False,
        "exclude": _is_not_traced,
    }


def _is_not_traced(scope: MutableMapping[str, Any]) -> bool:
    return scope.get("path") in _NOT_TRACED


@contextmanager
def span(name: str, **attributes: Attribute) -> Iterator[None]:
    """Show a stage as a part of the request that is being traced; does nothing outside of one.

    Args:
        name: of the stage.
        attributes: counts and sizes; nothing of what a caller has sent.
    """
    if not trace.get_current_span().is_recording():
        yield
        return
    with _tracer().start_as_current_span(
        name, attributes=_prefixed(attributes), record_exception=False, set_status_on_exception=False
    ) as current:
        try:
            yield
        except Exception as error:  # its type alone: its message may hold what a caller has sent
            current.set_attribute("error.type", type(error).__qualname__)
            current.set_status(StatusCode.ERROR)
            raise


def past_span(name: str, started_ns: int, ended_ns: int, **attributes: Attribute) -> None:
    """Show a stage that ran elsewhere, for several requests at a time, as a part of this one.

    Args:
        name: of the stage.
        started_ns: as of `time.time_ns`.
        ended_ns: likewise.
        attributes: counts and sizes; nothing of what a caller has sent.
    """
    if trace.get_current_span().is_recording():
        _tracer().start_span(name, attributes=_prefixed(attributes), start_time=started_ns).end(end_time=ended_ns)


def current_trace_id() -> str | None:
    """Of the request that is being traced, 32 hexadecimal digits."""
    context = trace.get_current_span().get_span_context()
    return format(context.trace_id, "032x") if context.is_valid else None


def flush_tracing(timeout_s: float = 5.0) -> None:
    """Send what is not sent yet; blocks, but not for longer than the timeout, whatever the receiver does."""
    flush = getattr(trace.get_tracer_provider(), "force_flush", None)
    if flush is None:
        return
    # The SDK ignores its own timeout; a daemon thread does not hold up the end of the process.
    thread = threading.Thread(target=flush, name="flush traces", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        _log.warning("traces not sent within %s s", timeout_s)


def _prefixed(attributes: Mapping[str, Attribute]) -> dict[str, Attribute]:
    return {ATTRIBUTE_PREFIX + name: value for name, value in attributes.items()}


def _tracer() -> Tracer:
    return _tracer_of(trace.get_tracer_provider())


@lru_cache(maxsize=1)
def _tracer_of(provider: TracerProvider) -> Tracer:
    """Remembered, since the SDK takes a lock and edits the filters of warnings for each one that is asked for."""
    return provider.get_tracer("hardlook")
