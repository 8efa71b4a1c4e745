"""Exports OpenTelemetry spans of every stage over OTLP. Serve creates the spans; this module says where they are
sent.

In a config, beside `applications:`:

    tracing_config: {enabled: true, exporter_import_path: "serve_app.tracing:otlp", sampling_ratio: 0.01}
"""

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor


def otlp() -> list[SpanProcessor]:
    """Exports to OTEL_EXPORTER_OTLP_ENDPOINT (http://localhost:4318); OpenTelemetry's other variables apply."""
    return [BatchSpanProcessor(OTLPSpanExporter())]
