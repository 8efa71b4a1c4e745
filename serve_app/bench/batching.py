"""Requests per second at rising concurrency: merging on, merging off, and the whole pipeline in one replica.

Every way is a Serve application on the same Ray, called through its handle, with as many torch threads.
"""

import asyncio
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from diffusers import FluxPipeline, FluxTransformer2DModel
from ray import serve
from rich.progress import Progress

from deployments.checkpoints.source import fetch_checkpoint
from serve_app.app import build_app
from serve_app.bench.report import Row, report
from serve_app.bench.whole import WholePipeline
from serve_app.config import AppConfig, parse_app_config

CONCURRENCIES = (1, 2, 4, 8)
WAYS = {"on": 8, "off": 1, "whole pipeline": 0}
"""What the column `merging` says, and the max_batch_size behind it; 0: the baseline."""


def run(*, loads: Mapping[str, tuple[int, int]], json_file: Path | None) -> None:
    """loads: by model ("tiny" or "100M"), requests per client and steps per request.

    Rows of `model`, `concurrency`, `merging`, `requests_per_s`, `p50_s`, `p99_s`."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder, Progress() as progress, _ray():
        task = progress.add_task("batching", total=len(loads) * len(WAYS) * len(CONCURRENCIES))
        for model, load in loads.items():
            handles = {}
            for way, max_batch_size in WAYS.items():
                config = _config(model, Path(folder), max(1, max_batch_size))
                application = (
                    serve.deployment(WholePipeline).bind(config) if not max_batch_size else build_app(config)
                )
                name = f"{model}-{max_batch_size}"
                handles[way] = serve.run(application, name=name, route_prefix=None)
            for concurrency in CONCURRENCIES:
                for way, handle in handles.items():
                    rows.append({"model": model} | _measure(way, handle, concurrency, *load))
                    progress.advance(task)
            for max_batch_size in WAYS.values():
                serve.delete(f"{model}-{max_batch_size}")
    report("requests per second, merging forwards of concurrent requests", rows, json_file)


def _measure(way: str, handle: Any, concurrency: int, num_requests: int, steps: int) -> dict[str, Any]:
    times: list[float] = []

    async def client(index: int) -> None:
        for i in range(num_requests):
            start = time.perf_counter()
            await handle.generate.remote(prompt=f"prompt {index} {i}", seed=i, num_inference_steps=steps)
            times.append(time.perf_counter() - start)

    async def clients() -> float:
        await handle.generate.remote(prompt="warm up", num_inference_steps=steps)
        start = time.perf_counter()
        await asyncio.gather(*(client(index) for index in range(concurrency)))
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
    checkpoint, size = "tiny://flux", 64
    if model == "100M":
        checkpoint, size = str(_write_medium_flux(folder / "medium")), 256
    return parse_app_config(
        {
            "model": {
                "name": model,
                "checkpoint": checkpoint,
                "defaults": {"width": size, "height": size},
            },
            "encoder": {"num_cpus": 0.1, "torch_threads": 1, "max_sequence_length": 16},
            "transformer": {"num_cpus": 0.1, "torch_threads": 1, "max_batch_size": max_batch_size},
            "vae": {"num_cpus": 0.1, "torch_threads": 1},
        }
    )


def _write_medium_flux(folder: Path) -> Path:
    """The tiny FLUX around a transformer of about 100 million random parameters."""
    if not folder.exists():
        tiny = FluxPipeline.from_pretrained(fetch_checkpoint("tiny://flux", ()))
        settings = dict(tiny.transformer.config) | {
            "num_layers": 4,
            "num_single_layers": 16,
            "num_attention_heads": 8,
            "attention_head_dim": 64,
            "axes_dims_rope": (16, 24, 24),
        }
        tiny.transformer = FluxTransformer2DModel.from_config(settings)
        tiny.save_pretrained(folder)
    return folder


@contextmanager
def _ray() -> Iterator[None]:
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        serve.start(proxy_location="Disabled")
        yield
    finally:
        serve.shutdown()
        ray.shutdown()
