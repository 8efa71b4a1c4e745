"""Measures what it costs to keep a request's predictions outside of its replica, and to continue from them.

Runs the same denoising in one process, with and without keeping in turn, so that drift of the machine's speed
affects both alike. The request's own thread puts predictions into Ray's object store at once; in a replica,
another thread does that.
"""

import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
import torch

from deployments.answers import DecodeArguments, JournalPart
from deployments.config.encoder import EncoderConfig
from deployments.config.model import ModelConfig
from deployments.config.transformer import TransformerConfig
from deployments.options.resume import ResumeConfig, UnsavedPart
from deployments.stages import load_stage
from serve_app.bench.models import bench_model, bench_request, fail
from serve_app.bench.progress import Progress
from serve_app.bench.report import Row, report

NUM_TEXT_TOKENS = 16
EVERY_STEPS = 4


def run(*, loads: Mapping[str, tuple[int, int]], json_file: Path | None) -> None:
    """Reports a row for each load.

    loads: number of images and of steps, by model ("tiny" or "100M").

    step_ms: time of a step without keeping. ratio: time with keeping over time without, the median of the ratios
        image by image.
    save_ms: time to save one part. share: save_ms over the time of the steps since the last part.
    resumed_steps: steps, of `steps`, that the last part covers. replay_ms: time that each of these takes then.
    """
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        with tempfile.TemporaryDirectory() as folder, Progress() as progress:
            rows = [_row(name, bench_model(name, Path(folder)), *load, progress) for name, load in loads.items()]
    finally:
        ray.shutdown()
    report("storing the steps that a request continues from", rows, json_file)


def _row(name: str, model: ModelConfig, num_pictures: int, num_steps: int, progress: Progress) -> Row:
    bench = _Denoises(model, num_steps)
    off, on = list[float](), list[float]()
    for i in progress.track(range(-1, num_pictures), description=name):
        plain_s, kept_s = bench.denoise(kept=False), bench.denoise(kept=True)
        if i >= 0:
            off.append(plain_s)
            on.append(kept_s)
    step_ms, save_ms = statistics.median(off) / num_steps * 1e3, statistics.median(bench.saves_s) * 1e3
    last = bench.parts[-1].num_steps
    unbroken, resumed_s = bench.made, bench.denoise(kept=False, journal=bench.parts)
    assert torch.equal(bench.made.latents, unbroken.latents)
    return {
        "model": name,
        "step_ms": step_ms,
        "ratio": statistics.median(a / b for a, b in zip(on, off, strict=True)),
        "save_ms": save_ms,
        "share": save_ms / (EVERY_STEPS * step_ms),
        "resumed_steps": last,
        "steps": num_steps,
        "replay_ms": max(0.0, resumed_s * 1e3 - (num_steps - last) * step_ms) / last,
    }


class _Denoises:
    """Denoises one request repeatedly."""

    def __init__(self, model: ModelConfig, num_steps: int) -> None:
        self._request = bench_request(model, num_steps)
        encoding = load_stage("encode", model, EncoderConfig(max_sequence_length=NUM_TEXT_TOKENS))
        self._encodings = encoding.encode(self._request)
        resume = ResumeConfig(every_steps=EVERY_STEPS, every_s=0.0)
        self._stage = load_stage("denoise", model, TransformerConfig(resume=resume))
        self._stage.connect(None, fail)
        self.saves_s: list[float] = []
        self.parts: list[JournalPart] = []
        """Parts of the last denoising that was kept."""
        self.made: DecodeArguments

    def denoise(self, *, kept: bool, journal: Any = ()) -> float:
        """Denoises the request once; returns the seconds that it took."""
        if kept:
            self.parts = []
        seat, began = self._stage.join(), time.perf_counter()
        try:
            self.made = self._stage.denoise(
                seat,
                self._encodings,
                self._request,
                journal=journal,
                on_part=self._save if kept else None,
            )
        finally:
            self._stage.leave(seat)
        return time.perf_counter() - began

    def _save(self, unsaved: UnsavedPart) -> None:
        began = time.perf_counter()
        part = unsaved.read()
        reference = ray.put(part)
        self.saves_s.append(time.perf_counter() - began)
        unsaved.is_saved = True
        self.parts.append(ray.get(reference))
