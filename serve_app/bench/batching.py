"""Requests per second at rising concurrency: merging on, merging off, and the whole pipeline in one replica.

Every way is a Serve application on the same Ray, called through its handle, with as many torch threads.
"""

import asyncio
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray import serve
from rich.progress import Progress

from serve_app.app import build_app
from serve_app.bench.models import bench_model
from serve_app.bench.private_serve import private_serve
from serve_app.bench.report import Row, report
from serve_app.bench.whole import WholePipeline
from serve_app.config import AppConfig, parse_app_config

WAYS = {"on": 8, "off": 1, "whole pipeline": 0}
"""What the column `merging` says, and the max_batch_size behind it; 0: the baseline."""


def run(*, loads: Mapping[str, tuple[int, int]], concurrencies: Sequence[int], json_file: Path | None) -> None:
    """loads: by model ("tiny" or "100M"), requests in all and steps per request.

    Rows of `model`, `concurrency`, `merging`, `requests_per_s`, `p50_s`, `p99_s`."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder, Progress() as progress, private_serve():
        task = progress.add_task("batching", total=len(loads) * len(WAYS) * len(concurrencies))
        for model, load in loads.items():
            with _serving(model, Path(folder)) as handles:
                for concurrency in concurrencies:
                    for way, handle in handles.items():
                        rows.append({"model": model} | _measure(way, handle, concurrency, *load))
                        progress.advance(task)
    report("requests per second, merging forwards of concurrent requests", rows, json_file)


@contextmanager
def _serving(model: str, folder: Path) -> Iterator[dict[str, Any]]:
    """A handle to every way's application."""
    applications = {}
    for way, max_batch_size in WAYS.items():
        config = _config(model, folder, max(1, max_batch_size))
        applications[way] = build_app(config) if max_batch_size else serve.deployment(WholePipeline).bind(config)
    targets = [
        serve.RunTarget(application, name=way, route_prefix=None) for way, application in applications.items()
    ]
    yield dict(zip(applications, serve.run_many(targets), strict=True))
    for way in applications:
        serve.delete(way)


def _measure(way: str, handle: Any, concurrency: int, num_requests: int, steps: int) -> dict[str, Any]:
    """So many clients, each of which sends its next request when it has the answer to the one before."""
    times: list[float] = []
    seeds = iter(range(num_requests))

    async def client() -> None:
        for seed in seeds:
            start = time.perf_counter()
            await handle.generate.remote(prompt=f"prompt {seed}", seed=seed, num_inference_steps=steps)
            times.append(time.perf_counter() - start)

    async def clients() -> float:
        await handle.generate.remote(prompt="warm up", num_inference_steps=steps)
        start = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(concurrency)))
        return time.perf_counter() - start

    elapsed_s = asyncio.run(clients())
    return {
        "concurrency": concurrency,
        "merging": way,
        "requests_per_s": len(times) / elapsed_s,
        "p50_s": statistics.median(times),
        "p99_s": sorted(times)[min(len(times) - 1, round(0.99 * len(times)))],
    }


def _config(model: str, folder: Path, max_batch_size: int) -> AppConfig:
    return parse_app_config(
        {
            "model": bench_model(model, folder).model_dump(),
            "encoder": {"num_cpus": 0.1, "torch_threads": 1, "max_sequence_length": 16},
            "transformer": {"num_cpus": 0.1, "torch_threads": 1, "max_batch_size": max_batch_size},
            "vae": {"num_cpus": 0.1, "torch_threads": 1},
        }
    )
