"""OpenTelemetry spans, where they are asked for: into a file, or to a collector by OTLP."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray_app.errors import ConfigError

from ..protocol.request_context import RequestContext

OTLP = "OTEL_EXPORTER_OTLP_ENDPOINT"


class Tracing:
    """Spans of requests, joined to the caller's by `traceparent`."""

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
    def request(self, call: RequestContext) -> Iterator[None]:
        """Around one request; its parts become child spans afterwards."""
        if self._tracer is None:
            yield
            return
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier = {"traceparent": call.headers.get(b"traceparent", b"").decode("latin-1")}
        parent = TraceContextTextMapPropagator().extract(carrier)
        name = f"{call.method} {call.route}"
        with self._tracer.start_as_current_span(name, parent, kind=SpanKind.SERVER) as span:
            call.trace_id = f"{span.get_span_context().trace_id:032x}"
            try:
                yield
            finally:
                span.set_attributes(
                    {
                        "http.request.method": call.method,
                        "http.route": call.route,
                        "align.request_id": call.request_id,
                        "align.model_version": call.version,
                        "align.pairs": call.pairs,
                        **{f"align.{part}_ms": seconds * 1e3 for part, seconds in call.spans.items()},
                    }
                )

    def ids(self, call: RequestContext) -> dict[str, str]:
        """The trace's id, for the log line."""
        return {"trace_id": call.trace_id} if call.trace_id else {}

    def close(self) -> None:
        """Sends what is left."""
        if self._provider is not None:
            self._provider.shutdown()


def exporter_of(file: Path | None) -> Any:
    """Where spans go; None where nobody asked. ConfigError: OTLP is asked for and its package is not there."""
    if os.environ.get(OTLP):
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        except ImportError as error:
            raise ConfigError(
                f"{OTLP} is set and its exporter is not there: pip install 'ray-app[traces]', or unset it."
            ) from error
        return OTLPSpanExporter()
    if file is None:
        return None
    from opentelemetry.sdk.trace.export import ConsoleSpanExporter

    return ConsoleSpanExporter(
        out=file.open("a", buffering=1), formatter=lambda span: span.to_json(indent=None) + "\n"
    )
