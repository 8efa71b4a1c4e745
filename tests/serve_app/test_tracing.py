"""Tests of OpenTelemetry spans: every stage has one in the client's trace, and OTLP exports them."""

import json
import re
import threading
import time
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from ray.serve._private.tracing_utils import _load_span_processors
from ray.serve.schema import TracingConfig

from serve_app.tracing import otlp

OPERATIONS = Path(__file__).parent.parent.parent / "docs" / "operations.md"
CALLS = ("Encoder encode", "Transformer denoise", "Vae decode")


@pytest.mark.slow
def test_every_stage_has_a_span_in_the_trace_of_the_client(flux_app: Any) -> None:
    """Serve samples nothing by itself in this session; `01` in the header says that the client does."""
    trace_id = uuid.uuid4().hex
    headers = {"traceparent": f"00-{trace_id}-{trace_id[:16]}-01"}
    answer = flux_app.client.post("/v1/images/generations", json={"prompt": "spans"}, headers=headers)
    assert answer.status_code == 200
    spans = wait_for_spans(trace_id, {f"replica_handle_request {call}" for call in CALLS})
    ids = {span["context"]["span_id"]: span["name"] for span in spans}
    for span in spans:
        if span["name"].startswith("replica_handle_request") and "Ingress" not in span["name"]:
            call = span["name"].removeprefix("replica_handle_request ")
            assert ids[span["parent_id"]] == f"route_to_replica {call}"
            assert span["attributes"]["request_id"] == answer.headers["x-request-id"]


def wait_for_spans(trace_id: str, names: set[str]) -> list[dict[str, Any]]:
    logs = Path(ray.nodes()[0]["ObjectStoreSocketName"]).parent.parent / "logs" / "serve" / "spans"
    deadline = time.monotonic() + 20
    while True:
        spans = [span for path in logs.iterdir() for span in parse(path.read_text())]
        spans = [span for span in spans if span["context"]["trace_id"] == f"0x{trace_id}"]
        if names <= {span["name"] for span in spans}:
            return spans
        assert time.monotonic() < deadline, sorted(span["name"] for span in spans)
        time.sleep(0.3)


def parse(text: str) -> list[dict[str, Any]]:
    """Returns the spans of a file: indented JSON objects, of which the last may be half written."""
    return [json.loads(part) for part in re.findall(r"^\{$.*?^\}$", text, re.MULTILINE | re.DOTALL)]


def test_serve_takes_the_documented_line_of_config() -> None:
    [line] = re.findall(r"^tracing_config: .*$", OPERATIONS.read_text(), re.MULTILINE)
    config = TracingConfig(**yaml.safe_load(line)["tracing_config"])
    [processor] = _load_span_processors(config.exporter_import_path, "unused.json")
    assert isinstance(processor, BatchSpanProcessor)
    processor.shutdown()


class Collector(BaseHTTPRequestHandler):
    received: tuple[str, bytes] | None = None

    def do_POST(self) -> None:
        type(self).received = self.path, self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Logs nothing."""


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Collector]]:
    server = HTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
    yield Collector
    server.shutdown()
    server.server_close()


def test_spans_go_to_the_endpoint_that_the_environment_names(collector: type[Collector]) -> None:
    provider = TracerProvider()
    for processor in otlp():
        provider.add_span_processor(processor)
    with provider.get_tracer("test").start_as_current_span("a span by this name"):
        pass
    provider.shutdown()
    assert collector.received is not None
    path, body = collector.received
    assert path == "/v1/traces"
    assert b"a span by this name" in body
