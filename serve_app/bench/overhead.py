"""What the engine costs a request that is alone: the same denoise, plain and through the step queue.

Both in this process and in turn, so that a drifting machine is fair to both: diffusers' pipeline over its own
transformer, and the denoise stage, which runs that pipeline over a stand-in, a queue and one shard.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from rich.progress import Progress

from deployments.checkpoints.source import fetch_checkpoint
from deployments.config import EncoderConfig, ModelConfig, TransformerConfig
from deployments.stages import load_stage
from deployments.stages.call import call_arguments
from serve_app.bench.models import bench_model, bench_request, fail
from serve_app.bench.report import Row, report

NUM_TEXT_TOKENS = 16


def run(*, loads: Mapping[str, tuple[int, int]], json_file: Path | None) -> None:
    """loads: by model ("tiny" or "100M"), how many pictures of how many steps.

    Rows of `model`, `design`, `p50_s`, `ratio` (the median of the ratios, picture by picture).
    """
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder, Progress() as progress:
        for name, (num_pictures, num_steps) in loads.items():
            ways = _ways(bench_model(name, Path(folder)), num_steps)
            times: dict[str, list[float]] = {design: [] for design in ways}
            for i in progress.track(range(-1, num_pictures), description=name):
                for design, draw in ways.items():
                    start = time.perf_counter()
                    draw()
                    if i >= 0:
                        times[design].append(time.perf_counter() - start)
            rows += [
                {
                    "model": name,
                    "design": design,
                    "p50_s": statistics.median(of),
                    "ratio": statistics.median(a / b for a, b in zip(of, times["plain"], strict=True)),
                }
                for design, of in times.items()
            ]
    report("a lone request's denoise", rows, json_file)


def _ways(model: ModelConfig, num_steps: int) -> dict[str, Callable[[], object]]:
    """By design, one denoise, to latents."""
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
