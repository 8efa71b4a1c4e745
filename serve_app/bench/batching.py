"""Measures requests per second at rising concurrency: merging on, off, and the whole pipeline in one replica.

Every way is a Serve application on the same Ray, called through its handle, with the same number of torch threads.
For the text encoders alone, in this process: prompts per second, encoded together or one by one.
"""

import asyncio
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import serve

from deployments.config.encoder import EncoderConfig
from deployments.config.model import ModelConfig
from deployments.stages import load_stage
from serve_app.app import build_app
from serve_app.bench.models import bench_model, bench_request
from serve_app.bench.progress import Progress
from serve_app.bench.report import Row, report
from serve_app.bench.whole import WholePipeline
from serve_app.commands.local import private_serve
from serve_app.config.app import AppConfig
from serve_app.config.serve_file import parse_app_config

WAYS = {"on": 8, "off": 1, "whole pipeline": 0}
"""Values of the column `merging`, each with its max_batch_size; 0: the baseline."""
NUM_IN_TURN = 8
"""Requests of one way before the next way's turn."""


def run(*, loads: Mapping[str, tuple[int, int]], concurrencies: Sequence[int], json_file: Path | None) -> None:
    """Reports rows of `model` (or its text encoders), `concurrency`, `merging`, `requests_per_s`, `speedup` over
    merging off, `p50_s`, `p99_s`.

    loads: number of requests and steps per request, by model ("tiny" or "100M").
    """
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder, Progress() as progress, private_serve():
        task = progress.add_task("batching", total=len(loads) * len(concurrencies))
        for model, load in loads.items():
            with _serving(model, Path(folder)) as handles:
                for concurrency in concurrencies:
                    rows += _measure(model, handles, concurrency, *load)
                    progress.advance(task)
            config = bench_model(model, Path(folder))
            for concurrency in concurrencies:
                rows += _measure_prompts(config, concurrency, load[0])
    report("requests per second, merging forwards of concurrent requests", rows, json_file)


@contextmanager
def _serving(model: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Runs every way's application; yields their handles by way."""
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


def _measure(
    model: str, handles: Mapping[str, Any], concurrency: int, num_requests: int, steps: int
) -> Iterator[Row]:
    """Yields a row for each way. They take turns, so that drift of the machine's speed affects all alike."""
    times: dict[str, list[float]] = {way: [] for way in handles}
    elapsed_s = dict.fromkeys(handles, 0.0)
    for handle in handles.values():
        handle.generate.remote(prompt="warm up", num_inference_steps=steps).result()
    for first in range(0, num_requests, NUM_IN_TURN):
        for way, handle in handles.items():
            start = time.perf_counter()
            times[way] += asyncio.run(_ask(handle, concurrency, range(first, first + NUM_IN_TURN), steps))
            elapsed_s[way] += time.perf_counter() - start
    yield from _rows(model, concurrency, times, elapsed_s)


def _rows(
    model: str, concurrency: int, times: Mapping[str, Sequence[float]], elapsed_s: Mapping[str, float]
) -> Iterator[Row]:
    rates = {way: len(of) / elapsed_s[way] for way, of in times.items()}
    for way, of in times.items():
        yield {
            "model": model,
            "concurrency": concurrency,
            "merging": way,
            "requests_per_s": rates[way],
            "speedup": rates[way] / rates["off"],
            "p50_s": statistics.median(of),
            "p99_s": sorted(of)[min(len(of) - 1, round(0.99 * len(of)))],
        }


async def _ask(handle: Any, concurrency: int, seeds: Sequence[int], steps: int) -> list[float]:
    """Returns the seconds of every request. Each client sends its next one when the one before is answered."""
    times: list[float] = []
    waiting = iter(seeds)

    async def client() -> None:
        for seed in waiting:
            start = time.perf_counter()
            await handle.generate.remote(prompt=f"prompt {seed}", seed=seed, num_inference_steps=steps)
            times.append(time.perf_counter() - start)

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return times


def _measure_prompts(model: ModelConfig, concurrency: int, num_prompts: int) -> Iterator[Row]:
    """Yields a row for each way of encoding `concurrency` waiting prompts. The ways take turns here, too."""
    stage = load_stage("encode", model, EncoderConfig(cache_mib=0, torch_threads=1, max_sequence_length=16))
    request = bench_request(model, 1)
    sizes = {"on": concurrency, "off": 1}
    times: dict[str, list[float]] = {way: [] for way in sizes}
    elapsed_s = dict.fromkeys(sizes, 0.0)
    for first in range(-concurrency, num_prompts, concurrency):
        asked = [
            (replace(request, prompt=replace(request.prompt, text=f"prompt {first + i}")), None)
            for i in range(concurrency)
        ]
        for way, size in sizes.items():
            start = time.perf_counter()
            done_s: list[float] = []
            for begin in range(0, concurrency, size):
                stage.encode_together(asked[begin : begin + size])
                done_s += [time.perf_counter() - start] * size
            if first >= 0:  # the first ones are for warm-up
                times[way] += done_s
                elapsed_s[way] += done_s[-1]
    yield from _rows(f"{model.name}, text encoders", concurrency, times, elapsed_s)


def _config(model: str, folder: Path, max_batch_size: int) -> AppConfig:
    return parse_app_config(
        {
            "model": bench_model(model, folder).model_dump(),
            "encoder": {"num_cpus": 0.1, "torch_threads": 1, "max_sequence_length": 16},
            "transformer": {"num_cpus": 0.1, "torch_threads": 1, "max_batch_size": max_batch_size},
            "vae": {"num_cpus": 0.1, "torch_threads": 1},
        }
    )
