"""Tests that what the stages count reaches Ray's Prometheus endpoint and `/v1/status`."""

import io
import re
import time
import uuid
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from rich.console import Console

from cluster.metrics import COUNTERS, GAUGES, HISTOGRAMS
from serve_app.commands.status import fetch_status, status_table

pytestmark = pytest.mark.slow
STAGES = ("encode", "denoise", "decode")
LINE = re.compile(r"^ray_(relay_\w+)\{(.*)\} ([0-9.e+-]+)$")


Values = dict[tuple[str, str], list[float]]


def scrape() -> Values:
    """Returns one value for each process and rank, by metric and stage."""
    text = httpx.get(f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}").text
    values: Values = defaultdict(list)
    for line in text.splitlines():
        if match := LINE.match(line):
            name, tags, value = match.groups()
            labels = dict(re.findall(r'(\w+)="([^"]*)"', tags))
            if labels.get("model") == "tiny-flux" and "stage" in labels:  # metrics of jobs have no stage
                values[name, labels["stage"]].append(float(value))
    return values


def wait_until(is_there: Callable[[Values], bool]) -> Values:
    """Waits for metrics that meet the condition, because each stage exports at its own times."""
    deadline = time.monotonic() + 60
    while not is_there(values := scrape()):
        assert time.monotonic() < deadline, values
        time.sleep(1)
    return values


def test_prometheus_sees_what_every_stage_has_counted(flux_app: Any) -> None:
    """Other tests use this app, or other apps of its model: the expected totals are read from its status."""
    num_requests, num_steps = 3, 5
    for seed in range(num_requests):
        flux_app.handle.generate.remote(prompt="counted", seed=seed, num_inference_steps=num_steps).result()
    status = flux_app.status()
    [encoder], [transformer], [vae] = (status[stage]["replicas"] for stage in ("encoder", "transformer", "vae"))
    batch_sizes = transformer["queue"]["batch_sizes"]
    counted = {
        ("relay_forwards_total", "encode"): encoder["num_forwards"],
        ("relay_cache_hits_total", "encode"): encoder["num_cache_hits"],
        ("relay_forwards_total", "denoise"): sum(int(size) * number for size, number in batch_sizes.items()),
        ("relay_micro_batches_total", "denoise"): transformer["ranks"][0]["num_micro_batches"],
        ("relay_batch_size_count", "denoise"): sum(batch_sizes.values()),
    }
    assert counted["relay_forwards_total", "denoise"] >= num_requests * num_steps
    assert counted["relay_cache_hits_total", "encode"] >= num_requests - 1
    assert vae["num_decoded"] >= num_requests
    values = wait_until(
        lambda values: (
            all(total in values[name] for name, total in counted.items())
            and sum(values["relay_stage_seconds_count", "decode"]) >= vae["num_decoded"]
        )
    )
    sums = {name: sum(of) for name, of in values.items()}
    assert sums["relay_step_seconds_count", "denoise"] >= num_requests * num_steps
    assert sums["relay_compute_seconds_total", "denoise"] > 0
    for stage in ("ingress", *STAGES):
        # Requests in progress on a replica that an earlier test has ended have no stage_seconds.
        assert num_requests <= sums["relay_stage_seconds_count", stage] <= sums["relay_requests_total", stage]
    for stage in STAGES:
        assert sums["relay_answered_bytes_total", stage] > 0
        assert sums["relay_weights_bytes", stage] > 100_000
        assert sums["relay_peak_memory_bytes", stage] > sums["relay_weights_bytes", stage]
        assert sums["relay_cold_start_seconds", stage] > 0
    # With one rank, no step cache, no budget for weights and short requests, nothing is ever sent, reused,
    # streamed, saved or resumed.
    never = {
        "relay_not_finite_total",
        "relay_resumed_forwards_total",
        "relay_resumed_requests_total",
        "relay_reused_forwards_total",
        "relay_saved_bytes_total",
        "relay_sent_bytes_total",
        "relay_streamed_bytes_total",
    }
    seen = {name.removesuffix("_count") for name, _ in sums}
    assert (set(COUNTERS) | set(GAUGES) | set(HISTOGRAMS)) - seen <= never


def test_status_tells_replicas_queues_blocks_and_bytes(flux_app: Any) -> None:
    status = flux_app.status()
    assert (status["model"], status["num_in_progress"]) == ("tiny-flux", 0)
    for stage in ("encoder", "transformer", "vae"):
        assert (status[stage]["state"], status[stage]["num_replicas"]) == ("HEALTHY", {"RUNNING": 1})
    [transformer] = status["transformer"]["replicas"]
    assert transformer["queue"]["num_waiting"] == 0
    [rank] = transformer["ranks"]
    assert rank["blocks"] == {"transformer": [0, 8]}
    assert rank["memory"]["weights_bytes"]["cpu float32"] > 1_000_000
    assert rank["device_map"] is None
    [encoder], [vae] = status["encoder"]["replicas"], status["vae"]["replicas"]
    assert (encoder["num_in_flight"], vae["num_in_flight"]) == (0, 0)
    assert encoder["pid"] != vae["pid"]


def test_the_status_at_a_glance_can_be_made_of_what_the_app_tells(flux_app: Any) -> None:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(status_table(fetch_status(flux_app.url)))
    text = console.export_text()
    for stage in ("encoder", "transformer", "vae"):
        assert re.search(rf"{stage} +│1 ", text), text


def test_a_request_id_and_a_trace_are_answered_and_in_every_stages_log(flux_app: Any) -> None:
    request_id, trace_id = f"test-{uuid.uuid4()}", uuid.uuid4().hex
    headers = {"x-request-id": request_id, "traceparent": f"00-{trace_id}-{trace_id[:16]}-00"}
    answer = flux_app.client.post("/v1/images/generations", json={"prompt": "traced"}, headers=headers)
    assert {name: answer.headers[name] for name in headers} == headers
    logs = Path(ray.nodes()[0]["ObjectStoreSocketName"]).parent.parent / "logs" / "serve"
    for stage, line in STAGE_LINES.items():
        wait_for_line(logs, f"replica_{flux_app.name}_{stage}_*.log", rf"{request_id} -- {line}")
    wait_for_line(logs, f"replica_{flux_app.name}_Ingress_*.log", rf"{request_id} -- trace {trace_id}")


STAGE_LINES = {
    "Ingress": "POST .*/v1/images/generations 200",
    "Encoder": "CALL encode OK",
    "Transformer": "CALL denoise OK",
    "Vae": "CALL decode OK",
}


def wait_for_line(logs: Path, files: str, pattern: str) -> None:
    """Waits for a line that matches the pattern, because Serve buffers its logs."""
    deadline = time.monotonic() + 20
    while not any(re.search(pattern, path.read_text()) for path in logs.glob(files)):
        assert time.monotonic() < deadline, f"{pattern!r} is in none of {list(logs.glob(files))}"
        time.sleep(0.3)


def test_a_malformed_traceparent_is_not_answered(flux_app: Any) -> None:
    answer = flux_app.client.get("/v1/models", headers={"traceparent": "00-xyz"})
    assert answer.status_code == 200
    assert "traceparent" not in answer.headers
