"""Runs one way of `relay bench memory`: reads it from stdin, generates images, and prints times and memory."""

import gc
import json
import os
import resource
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from cluster.machines import accelerator
from deployments.checkpoints.geometry import with_geometry
from deployments.checkpoints.source import fetch_checkpoint
from deployments.config.encoder import EncoderConfig
from deployments.config.model import ModelConfig
from deployments.config.transformer import TransformerConfig
from deployments.config.vae import VaeConfig
from deployments.memory.stats import MemoryStats
from deployments.stages import load_stage
from deployments.stages.call_arguments import call_arguments
from serve_app.bench.models import bench_request, fail

MIB = 2**20
NUM_TEXT_TOKENS = 64
GPU = accelerator.find_device()
HAS_GPU = GPU is not None
STUCK_AFTER_S = 600.0
"""Long, since a first step may compile or read 40 GB from a cold disk; the caller has its own time limit."""


def main() -> None:
    case = json.load(sys.stdin)
    model = with_geometry(ModelConfig.model_validate(case["model"]))
    torch.set_num_threads(os.cpu_count() or 1)
    bare = _resident_bytes()
    start = time.perf_counter()
    build = _Plain if case["stages"] is None else _Relay
    draw = build(model, case["stages"], case["steps"])
    load_s = time.perf_counter() - start
    draw()
    draw()
    peak_mib = (draw.peak_bytes() - (0 if HAS_GPU else bare)) / MIB
    # A CPU's speed may drift within minutes, and host memory has room for the plain pipeline as well.
    plain = None if HAS_GPU or build is _Plain else _Plain(model, None, case["steps"])
    if plain is not None:
        plain()
    times, ratios = [], []
    for _ in range(case["pictures"]):
        times.append(_seconds(draw))
        if plain is not None:
            ratios.append(times[-1] / _seconds(plain))
    measured = {"load_s": load_s, "p50_s": statistics.median(times), "peak_mib": peak_mib}
    if ratios:
        measured["time_ratio"] = statistics.median(ratios)
    print(json.dumps(measured | draw.stats()))


def _seconds(draw: Callable[[], None]) -> float:
    start = time.perf_counter()
    draw()
    return time.perf_counter() - start


class _Relay:
    """The three stages in this process, as their replicas run them."""

    def __init__(self, model: ModelConfig, stages: Mapping[str, Any], num_steps: int) -> None:
        shared = {"num_gpus": 1 if HAS_GPU else 0, "torch_threads": os.cpu_count()}
        tokens = None if model.architecture.max_sequence_length is None else NUM_TEXT_TOKENS
        encoder = EncoderConfig(**shared | {"max_sequence_length": tokens} | stages.get("encoder", {}))
        transformer = TransformerConfig(
            **shared | {"stuck_after_s": STUCK_AFTER_S} | stages.get("transformer", {})
        )
        vae = VaeConfig(**shared | stages.get("vae", {}))
        self._encoding = load_stage("encode", model, encoder)
        self._denoising = load_stage("denoise", model, transformer)
        self._decoding = load_stage("decode", model, vae)
        self._denoising.connect(None, fail)
        self._leaves_when_idle = transformer.leaves_when_idle
        self._request = bench_request(model, num_steps)
        self._num_pictures = 0

    def __call__(self) -> None:
        seat = self._denoising.join()
        try:
            encodings = self._encoding.encode(self._request)
            arguments = self._denoising.denoise(seat, encodings, self._request)
        finally:
            num_computed = self._denoising.engine.stats().num_computed
            self._denoising.leave(seat)
        while self._leaves_when_idle and self._denoising.engine.stats().num_computed == num_computed:
            time.sleep(0.001)  # until its weights are off the device, which the VAE needs
        self._decoding.decode(arguments, self._request)
        self._num_pictures += 1

    def peak_bytes(self) -> int:
        """Returns the peak of the whole process, all of which each stage measures during its calls."""
        return max(memory.peak_allocated_bytes for memory in self._memories())

    def _memories(self) -> list[MemoryStats]:
        residencies = (self._encoding.residency, self._denoising.loaded.residency, self._decoding.residency)
        return [residency.stats() for residency in residencies]

    def stats(self) -> dict[str, float]:
        """Returns the seconds per image that lease changes took, and the denoiser's peak of limited weights."""
        memories = self._memories()
        leases = [memory.lease for memory in memories if memory.lease is not None]
        told = {}
        if leases:
            told["switching_s"] = sum(lease.loading_s + lease.unloading_s for lease in leases) / self._num_pictures
        for limit in memories[1].vram_limits:
            told["limited_mib"] = limit.peak_bytes / MIB
        return told


class _Plain:
    """diffusers' own pipeline, entirely on the device."""

    def __init__(self, model: ModelConfig, _stages: None, num_steps: int) -> None:
        folder = Path(fetch_checkpoint(model.checkpoint, (), revision=model.revision, variant=model.variant))
        self._pipe: Any = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, variant=model.variant)
        self._pipe.to(GPU or "cpu")
        self._pipe.set_progress_bar_config(disable=True)
        self._request = bench_request(model, num_steps)

    def __call__(self) -> None:
        self._pipe(**call_arguments(type(self._pipe), self._request, NUM_TEXT_TOKENS))

    def peak_bytes(self) -> int:
        return _most_resident_bytes() if GPU is None else accelerator.peak_bytes(GPU)[0]

    def stats(self) -> dict[str, float]:
        """Returns nothing: the plain pipeline has no further figures."""
        return {}


def _resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _most_resident_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    try:
        main()
    except Exception as error:  # the caller's table shows it
        traceback.print_exc()
        first_line = str(error).strip().partition("\n")[0]
        print(json.dumps({"error": f"{type(error).__name__}: {first_line}"}))
