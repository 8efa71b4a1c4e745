"""Measures one tiled decode over one replica of the VAE and over two: the speedup, and whether images are equal.

Each way is a Serve application on the same Ray, of the VAE alone, called through its handle; each replica has one
torch thread. Seconds are measured at the caller, so that the transfer of tensors and file counts.
"""

import io
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from ray import serve

from cluster.replicas.serve_options import plan_serve_options
from deployments.answers import DecodeArguments
from deployments.config.model import ModelConfig
from deployments.config.vae import VaeConfig
from deployments.vae import Vae
from serve_app.bench.models import bench_model, bench_request
from serve_app.bench.progress import Progress
from serve_app.bench.report import Row, report
from serve_app.commands.local import private_serve

REPLICAS = (1, 2)
"""Numbers of replicas; the first is the baseline."""
LATENT_CHANNELS, PIXELS_PER_LATENT = 16, 8
"""Values of FLUX's VAE."""


def run(*, model: str, size: int, tile: int, num_rounds: int, json_file: Path | None) -> None:
    """Reports rows of `replicas`, `size`, `tile`, `decode_s` (median), `speedup` over one replica, `grey_levels`.

    grey_levels: the largest difference from the image of one replica.

    model: a name for `bench_model`. size, tile: sides of the image and of a tile, in pixels.
    """
    with tempfile.TemporaryDirectory() as folder, private_serve(), Progress() as progress:
        served = bench_model(model, Path(folder))
        targets = [
            serve.RunTarget(_application(served, tile, number), name=f"tiles over {number}", route_prefix=None)
            for number in REPLICAS
        ]
        handles: Sequence[Any] = serve.run_many(targets)
        request = replace(bench_request(served, 1), width=size, height=size)
        rng = torch.Generator().manual_seed(0)
        side = size // PIXELS_PER_LATENT
        latents = DecodeArguments.of(torch.randn(1, LATENT_CHANNELS, side, side, generator=rng))
        times: list[list[float]] = [[] for _ in handles]
        files: list[bytes] = [b"" for _ in handles]
        for number in progress.track(range(1 + num_rounds), description="tiles"):  # in turn, against drift
            for way, handle in enumerate(handles):
                start = time.perf_counter()
                files[way] = handle.decode.remote(latents, request).result().data
                if number:  # the first is for warm-up
                    times[way].append(time.perf_counter() - start)
    report("one tiled decode over replicas of the VAE", _rows(size, tile, times, files), json_file)


def _application(model: ModelConfig, tile: int, num_replicas: int) -> serve.Application:
    config = VaeConfig.model_validate(
        {
            "num_cpus": 0.1,
            "torch_threads": 1,
            "min_replicas": num_replicas,
            "max_replicas": num_replicas,
            "tiling": tile,
        }
    )
    vae = serve.deployment(Vae).options(**plan_serve_options(config, graceful_shutdown_timeout_s=5.0))
    return vae.bind(model, config)


def _rows(size: int, tile: int, times: Sequence[Sequence[float]], files: Sequence[bytes]) -> list[Row]:
    seconds, pictures = [statistics.median(of) for of in times], [_pixels(file) for file in files]
    return [
        {
            "replicas": num_replicas,
            "size": size,
            "tile": tile,
            "decode_s": decode_s,
            "speedup": seconds[0] / decode_s,
            "grey_levels": int(np.abs(picture - pictures[0]).max()),
        }
        for num_replicas, decode_s, picture in zip(REPLICAS, seconds, pictures, strict=True)
    ]


def _pixels(file: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(file))).astype(int)
