"""OpenTelemetry spans, if enabled: into a file, or to a collector by OTLP."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_app.errors import ConfigError

if TYPE_CHECKING:
    from ..http.request import RequestContext

OTLP = "OTEL_EXPORTER_OTLP_ENDPOINT"


class Tracing:
    """Spans of requests, children of the client's span in `traceparent`."""

    def __init__(self, file: Path | None, replica: str) -> None:
        self._tracer: Any = None
        self._provider: Any = None
        if exporter := exporter_of(file):
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor

            resource = Resource.create({"service.name": "ray-app-serve", "service.instance.id": replica})
            self._provider = TracerProvider(resource=resource)
            self._provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=1000))
            self._tracer = self._provider.get_tracer("ray_app.serve")

    @contextmanager
    def request(self, ctx: "RequestContext") -> Iterator[None]:
        """Record a span around one request, with the times of its parts as attributes."""
        if self._tracer is None:
            yield
            return
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier = {"traceparent": ctx.headers.get(b"traceparent", b"").decode("latin-1")}
        parent = TraceContextTextMapPropagator().extract(carrier)
        name = f"{ctx.method} {ctx.route}"
        with self._tracer.start_as_current_span(name, parent, kind=SpanKind.SERVER) as span:
            ctx.trace_id = f"{span.get_span_context().trace_id:032x}"
            try:
                yield
            finally:
                span.set_attributes(
                    {
                        "http.request.method": ctx.method,
                        "http.route": ctx.route,
                        "align.request_id": ctx.request_id,
                        "align.model_version": ctx.version,
                        "align.pairs": ctx.pairs,
                        **{f"align.{part}_ms": seconds * 1e3 for part, seconds in ctx.spans.items()},
                    }
                )

    def close(self) -> None:
        """Send the remaining spans."""
        if self._provider is not None:
            self._provider.shutdown()


def exporter_of(file: Path | None) -> Any:
    """Exporter of spans, None if tracing is off. ConfigError: OTLP is set but its package is not installed."""
    if os.environ.get(OTLP):
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        except ImportError as error:
            raise ConfigError(
                f"{OTLP} is set but its exporter is not installed: pip install 'ray-app[traces]', or unset it."
            ) from error
        return OTLPSpanExporter()
    if file is None:
        return None
    from opentelemetry.sdk.trace.export import ConsoleSpanExporter

    return ConsoleSpanExporter(
        out=file.open("a", buffering=1, encoding="utf-8"), formatter=lambda span: span.to_json(indent=None) + "\n"
    )
