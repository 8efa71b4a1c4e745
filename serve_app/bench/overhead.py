"""Measures the engine's cost for a lone request: the same denoising, plain and through the step queue.

Both run in this process, in turn, so that drift of the machine's speed affects both alike: diffusers' pipeline
with its own transformer, and the denoise stage, which runs that pipeline with a stand-in, a queue and one shard.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from deployments.checkpoints.source import fetch_checkpoint
from deployments.config.encoder import EncoderConfig
from deployments.config.model import ModelConfig
from deployments.config.transformer import TransformerConfig
from deployments.stages import load_stage
from deployments.stages.call_arguments import call_arguments
from serve_app.bench.models import bench_model, bench_request, fail
from serve_app.bench.progress import Progress
from serve_app.bench.report import Row, report

NUM_TEXT_TOKENS = 16


def run(*, loads: Mapping[str, tuple[int, int]], json_file: Path | None) -> None:
    """Reports rows of `model`, `design`, `p50_s`, `ratio` (the median of the ratios, image by image).

    loads: number of images and of steps, by model ("tiny" or "100M").
    """
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder, Progress() as progress:
        for name, (num_pictures, num_steps) in loads.items():
            ways = _ways(bench_model(name, Path(folder)), num_steps)
            times = _measure(ways, progress.track(range(-1, num_pictures), description=name))
            rows += [
                {"model": name, "design": design, "p50_s": statistics.median(of), "ratio": _ratio(times, design)}
                for design, of in times.items()
            ]
    report("a lone request's denoise", rows, json_file)


def compare_with_plain(model: ModelConfig, num_pictures: int, num_steps: int) -> float:
    """Returns the engine's time over the plain pipeline's: the median of the ratios, image by image."""
    return _ratio(_measure(_ways(model, num_steps), range(-1, num_pictures)), "engine")


def _measure(ways: Mapping[str, Callable[[], object]], numbers: Iterable[int]) -> dict[str, list[float]]:
    """Returns the seconds of each image, by design. numbers: those below 0 are for warm-up."""
    times: dict[str, list[float]] = {design: [] for design in ways}
    for i in numbers:
        for design, draw in ways.items():
            start = time.perf_counter()
            draw()
            if i >= 0:
                times[design].append(time.perf_counter() - start)
    return times


def _ratio(times: Mapping[str, list[float]], design: str) -> float:
    return statistics.median(a / b for a, b in zip(times[design], times["plain"], strict=True))


def _ways(model: ModelConfig, num_steps: int) -> dict[str, Callable[[], object]]:
    """Returns, by design, a function that denoises one request to latents."""
    request = bench_request(model, num_steps)
    encoding = load_stage("encode", model, EncoderConfig(max_sequence_length=NUM_TEXT_TOKENS))
    encodings = encoding.encode(request)
    stage = load_stage("denoise", model, TransformerConfig())
    stage.connect(None, fail)
    absent: dict[str, Any] = dict.fromkeys(("text_encoder", "text_encoder_2", "vae"))
    pipe: Any = DiffusionPipeline.from_pretrained(fetch_checkpoint(model.checkpoint, ()), **absent)
    pipe.set_progress_bar_config(disable=True)
    prompt_embeds, pooled_prompt_embeds, _ = dict(encodings)["encode_prompt"]
    texts = {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds, "prompt": None}

    def through_the_engine() -> object:
        seat = stage.join()
        try:
            return stage.denoise(seat, encodings, request)
        finally:
            stage.leave(seat)

    def plain() -> object:
        return pipe(**call_arguments(type(pipe), request) | texts | {"output_type": "latent"})

    return {"plain": plain, "engine": through_the_engine}
