"""Measures requests per second with a different LoRA adapter per request, against requests without adapters.

Runs one Serve application, called through its handle. The ways take turns; adapters are loaded beforehand.
"""

import asyncio
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ray import serve
from safetensors.torch import save_file
from torch import nn

from deployments.config.model import ModelConfig
from deployments.config.transformer import TransformerConfig
from deployments.engine.load import open_denoisers
from serve_app.app import build_app
from serve_app.bench.models import bench_model
from serve_app.bench.progress import Progress
from serve_app.bench.report import Row, report
from serve_app.commands.local import private_serve
from serve_app.config.app import AppConfig
from serve_app.config.serve_file import APP_NAME, parse_app_config

NUM_ADAPTERS = 8
RANK = 16
NUM_IN_TURN = 8
WAYS: Mapping[str, Callable[[int], list[dict[str, Any]]]] = {
    "none": lambda _seed: [],
    "one for all": lambda _seed: [{"name": "adapter-0"}],
    "each its own": lambda seed: [{"name": f"adapter-{seed % NUM_ADAPTERS}"}],
}
"""By name of the way, a function from a request's seed to its adapters."""


def run(*, loads: Mapping[str, tuple[int, int]], concurrencies: Sequence[int], json_file: Path | None) -> None:
    """Reports rows of `model`, `concurrency`, `adapters`, `requests_per_s`, and `ratio` to no adapters.

    loads: number of requests and steps per request, by model ("tiny" or "100M").
    """
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder, Progress() as progress, private_serve():
        task = progress.add_task("adapters", total=len(loads) * len(concurrencies))
        for model, load in loads.items():
            handle = serve.run(build_app(_config(model, Path(folder))), name=APP_NAME, route_prefix=None)
            for concurrency in concurrencies:
                rows += [{"model": model, **row} for row in _measure(handle, concurrency, *load)]
                progress.advance(task)
            serve.delete(APP_NAME)
    report(f"{NUM_ADAPTERS} LoRA adapters of rank {RANK}", rows, json_file)


def write_adapter(model: ModelConfig, folder: Path, seed: int) -> Path:
    """Writes an adapter with random weights for every linear layer in the blocks of the model's denoiser."""
    config = TransformerConfig()
    [(component, skeleton)] = open_denoisers(model, config).skeletons.items()
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, torch.Tensor] = {}
    for name, layer in skeleton.named_modules():
        if isinstance(layer, nn.Linear) and "blocks." in name:
            down = torch.randn(RANK, layer.in_features, generator=generator) / layer.in_features**0.5
            weights[f"{component}.{name}.lora_A.weight"] = down
            weights[f"{component}.{name}.lora_B.weight"] = (
                torch.randn(layer.out_features, RANK, generator=generator) / 10
            )
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"adapter-{seed}.safetensors"
    save_file(weights, file)
    return file


def _measure(handle: Any, concurrency: int, num_requests: int, steps: int) -> list[Row]:
    elapsed_s = dict.fromkeys(WAYS, 0.0)
    for way in WAYS:  # loads the adapters
        asyncio.run(_ask(handle, concurrency, range(NUM_ADAPTERS), steps, way))
    for first in range(0, num_requests, NUM_IN_TURN):
        for way in WAYS:
            start = time.perf_counter()
            asyncio.run(_ask(handle, concurrency, range(first, first + NUM_IN_TURN), steps, way))
            elapsed_s[way] += time.perf_counter() - start
    rates = {way: num_requests / elapsed_s[way] for way in WAYS}
    return [
        {"concurrency": concurrency, "adapters": way, "requests_per_s": rate, "ratio": rate / rates["none"]}
        for way, rate in rates.items()
    ]


async def _ask(handle: Any, concurrency: int, seeds: Sequence[int], steps: int, way: str) -> None:
    """Sends requests from `concurrency` clients, each of which waits for one answer before its next request."""
    waiting = iter(seeds)

    async def client() -> None:
        for seed in waiting:
            fields = {
                "prompt": f"prompt {seed}",
                "seed": seed,
                "num_inference_steps": steps,
                "lora": WAYS[way](seed),
            }
            await handle.generate.remote(**fields)

    await asyncio.gather(*(client() for _ in range(concurrency)))


def _config(name: str, folder: Path) -> AppConfig:
    model = bench_model(name, folder)
    files = {
        f"adapter-{seed}": write_adapter(model, folder / f"{name}-lora", seed) for seed in range(NUM_ADAPTERS)
    }
    return parse_app_config(
        {
            "model": model.model_dump()
            | {"adapters": {key: {"source": str(file)} for key, file in files.items()}},
            "encoder": {"num_cpus": 0.1, "torch_threads": 1, "max_sequence_length": 16},
            "transformer": {"num_cpus": 0.1, "torch_threads": 1},
            "vae": {"num_cpus": 0.1, "torch_threads": 1},
        }
    )
