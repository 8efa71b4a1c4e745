"""One way of `relay bench memory`: reads it from stdin, draws, and prints what it took."""

import gc
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from deployments.checkpoints.source import detect_family, fetch_checkpoint
from deployments.config import EncoderConfig, ModelConfig, TransformerConfig, VaeConfig
from deployments.engine.load import open_denoiser
from deployments.families import FAMILIES
from deployments.stages import load_stage
from serve_app.bench.models import bench_request, fail

MIB = 2**20
NUM_TEXT_TOKENS = 64
HAS_GPU = torch.cuda.is_available()


def main() -> None:
    case = json.load(sys.stdin)
    model = ModelConfig.model_validate(case["model"])
    torch.set_num_threads(os.cpu_count() or 1)
    bare = _resident_bytes()
    start = time.perf_counter()
    draw = _plain(model, case["steps"]) if case["stages"] is None else _relay(model, case["stages"], case["steps"])
    load_s = time.perf_counter() - start
    draw()
    times = []
    for _ in range(case["pictures"]):
        start = time.perf_counter()
        draw()
        times.append(time.perf_counter() - start)
    print(json.dumps({"load_s": load_s, "p50_s": statistics.median(times), "peak_mib": _peak(bare) / MIB}))


def _relay(model: ModelConfig, stages: dict[str, Any], num_steps: int) -> Callable[[], None]:
    family = model.family or detect_family(model.checkpoint, model.revision)
    shared = {"num_gpus": 1, "torch_threads": os.cpu_count()} if HAS_GPU else {"torch_threads": os.cpu_count()}
    tokens = None if FAMILIES[family].max_sequence_length is None else NUM_TEXT_TOKENS
    encoder = EncoderConfig(**shared | {"max_sequence_length": tokens} | stages.get("encoder", {}))
    transformer = TransformerConfig(**shared | _limited(model, family, stages.get("transformer", {})))
    vae = VaeConfig(**shared | stages.get("vae", {}))
    encoding = load_stage("encode", model, family, encoder)
    denoising = load_stage("denoise", model, family, transformer)
    decoding = load_stage("decode", model, family, vae)
    denoising.connect(None, fail)
    request = bench_request(model, family, num_steps)

    def draw() -> None:
        seat = denoising.join()
        try:
            embeds = encoding.encode(request.prompt)
            latents = denoising.denoise(seat, embeds, request, on_step=lambda _step, _latents: None)
        finally:
            denoising.leave(seat)
        decoding.decode(latents, request)

    return draw


def _limited(model: ModelConfig, family: str, settings: dict[str, Any]) -> dict[str, Any]:
    """vram_limit_gib is said as a share of the weights."""
    if "vram_limit_gib" not in settings:
        return settings
    skeleton = open_denoiser(model, FAMILIES[family], TransformerConfig()).skeleton
    num_bytes = sum(parameter.numel() for parameter in skeleton.parameters()) * 4
    return settings | {"vram_limit_gib": settings["vram_limit_gib"] * num_bytes / 2**30}


def _plain(model: ModelConfig, num_steps: int) -> Callable[[], None]:
    family = model.family or detect_family(model.checkpoint, model.revision)
    folder = Path(fetch_checkpoint(model.checkpoint, (), revision=model.revision, variant=model.variant))
    pipe: Any = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, variant=model.variant)
    pipe.to("cuda" if HAS_GPU else "cpu")
    pipe.set_progress_bar_config(disable=True)
    request = bench_request(model, family, num_steps)
    tokens = {} if FAMILIES[family].max_sequence_length is None else {"max_sequence_length": NUM_TEXT_TOKENS}

    def draw() -> None:
        pipe(
            request.prompt.text,
            width=request.width,
            height=request.height,
            num_inference_steps=num_steps,
            generator=torch.Generator("cpu").manual_seed(request.seed),
            **FAMILIES[family].call(request),
            **tokens,
        )

    return draw


def _resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _peak(bare: int) -> int:
    if HAS_GPU:
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - bare


if __name__ == "__main__":
    main()
