"""What the stages count reaches Ray's Prometheus endpoint, and `/v1/status`."""

import re
import time
from typing import Any

import httpx
import pytest
import ray

pytestmark = pytest.mark.slow
LINE = re.compile(r"^ray_(relay_\w+)\{(.*)\} ([0-9.e+-]+)$")


def scrape() -> dict[tuple[str, str], float]:
    """Sums over ranks and replicas, by metric and stage."""
    text = httpx.get(f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}").text
    sums: dict[tuple[str, str], float] = {}
    for line in text.splitlines():
        if match := LINE.match(line):
            name, tags, value = match.groups()
            labels = dict(re.findall(r'(\w+)="([^"]*)"', tags))
            if labels.get("model") == "tiny-flux":
                key = name, labels["stage"]
                sums[key] = sums.get(key, 0.0) + float(value)
    return sums


def test_prometheus_sees_every_request_of_every_stage(flux_app: Any) -> None:
    steps = 5
    for seed in range(3):
        flux_app.handle.generate.remote(prompt="counted", seed=seed, num_inference_steps=steps).result()
    status = flux_app.client.get("/v1/status").json()
    forwards = sum(int(size) * n for size, n in status["transformer"]["queue"]["batch_sizes"].items())
    least = {
        ("relay_forwards_total", "denoise"): forwards,
        ("relay_requests_total", "encode"): 3,
        ("relay_requests_total", "denoise"): 3,
        ("relay_requests_total", "decode"): 3,
        ("relay_cache_hits_total", "encode"): 2,
    }
    deadline = time.monotonic() + 60
    sums = scrape()
    while time.monotonic() < deadline and any(sums.get(key, 0) < value for key, value in least.items()):
        time.sleep(1)  # every stage exports by its own clock
        sums = scrape()
    assert {key: sums.get(key, 0) for key in least if sums.get(key, 0) < least[key]} == {}
    assert forwards >= 3 * steps
    assert sums["relay_compute_seconds_total", "denoise"] > 0
    assert sums["relay_batch_size_count", "denoise"] == sums["relay_micro_batches_total", "denoise"]


def test_status_tells_blocks_bytes_and_cache(flux_app: Any) -> None:
    status = flux_app.client.get("/v1/status").json()
    [rank] = status["transformer"]["ranks"]
    assert rank["blocks"] == [0, 8]
    assert rank["memory"]["weights_bytes"]["cpu float32"] > 1_000_000
    assert rank["device_map"] is None
    assert status["encoder"]["num_forwards"] >= 0
    assert status["vae"]["pid"] > 0
