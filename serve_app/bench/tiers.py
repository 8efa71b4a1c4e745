"""Measures step caches: requests per second, how far images change, and whether they still match their prompts.

Runs one Serve application, called through its handle. The tiers take turns with the same prompts and seeds.
"""

import asyncio
import io
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from ray import serve

from deployments.training.shapes.grader import grade
from deployments.training.shapes.scene import Scene, random_scene
from deployments.training.shapes.wording import describe_unseen
from serve_app.app import build_app
from serve_app.bench.frontier import draw_frontier
from serve_app.bench.progress import Progress
from serve_app.bench.report import Row, report
from serve_app.commands.local import private_serve
from serve_app.config.app import AppConfig
from serve_app.config.serve_file import APP_NAME, parse_app_config

SHAPES = "embedded://shapes"
NUM_IN_TURN = 25
"""Requests of one tier before the next tier's turn."""
ASPECTS = ("color", "place", "shape", "background", "size")
"""What the grader checks in an image of `shapes`."""
BASELINE = "high"
CONCURRENCIES = (1, 8)
Fields = Mapping[str, Any]
QUICK: Mapping[str, Fields] = {tier: {"quality": tier} for tier in (BASELINE, "medium", "low")}
"""Request fields by name of the tier."""
_CACHES: Mapping[str, Fields] = {
    "every 2nd, reused": {"kind": "taylor_seer", "interval": 2, "order": 0},
    "every 4th, reused": {"kind": "taylor_seer", "interval": 4, "order": 0},
    "every 4th, order 2": {"kind": "taylor_seer", "interval": 4, "order": 2},
    "easy_cache 0.05": {"kind": "easy_cache", "threshold": 0.05},
    "easy_cache 0.2": {"kind": "easy_cache", "threshold": 0.2},
}
TIERS: Mapping[str, Fields] = {**QUICK, **{name: {"step_cache": cache} for name, cache in _CACHES.items()}}
Pixels = NDArray[np.uint8]


def run(
    *,
    model: str,
    tiers: Mapping[str, Fields],
    num_prompts: int,
    num_steps: int,
    json_file: Path | None,
    svg_file: Path | None,
) -> None:
    """Reports rows of `tier`, `forwards` (computed, in one request), `of` (asked for, in one request),
    `requests_per_s_1` and `_8` and their ratios to high, `psnr_db` (the median over images, against high), and the
    shares of images that pass the grader's checks.

    tiers: request fields by name; one tier is called "high".
    """
    rng = np.random.default_rng(15)
    scenes = [random_scene(rng, is_held_out=True) for _ in range(num_prompts)]
    prompts = [describe_unseen(scene, rng) for scene in scenes]
    with private_serve(), Progress() as progress:
        handle = serve.run(build_app(_config(model)), name=APP_NAME, route_prefix=None)
        ways = {
            concurrency: {
                name: _Way({"num_inference_steps": num_steps, **fields}) for name, fields in tiers.items()
            }
            for concurrency in CONCURRENCIES
        }
        for place, (concurrency, of) in enumerate(ways.items()):
            numbers = range(place, num_prompts, len(ways))  # a different set of prompts for each
            for way in of.values():
                way.ask(handle, concurrency, prompts, numbers[:1])
            for first in progress.track(range(0, len(numbers), NUM_IN_TURN), description=f"{concurrency} at once"):
                for way in of.values():
                    way.ask_timed(handle, concurrency, prompts, numbers[first : first + NUM_IN_TURN])
    rows = [_row(name, ways, scenes if model == SHAPES else ()) for name in tiers]
    report(f"step caches over {num_steps} steps", rows, json_file)
    if svg_file is not None:
        points = {str(row["tier"]): (1 / float(row["speedup_1"]), _error(float(row["psnr_db"]))) for row in rows}
        svg_file.write_text(
            draw_frontier(points, x_label="time relative to high", y_label="RMS difference from high, of 255")
        )


class _Way:
    """One tier at one concurrency."""

    def __init__(self, fields: Fields) -> None:
        self._fields = fields
        self._elapsed_s = 0.0
        self.pictures: dict[int, Any] = {}

    @property
    def requests_per_s(self) -> float:
        return len(self.pictures) / self._elapsed_s

    def ask_timed(self, handle: Any, concurrency: int, prompts: Sequence[str], numbers: Sequence[int]) -> None:
        start = time.perf_counter()
        self.pictures |= self.ask(handle, concurrency, prompts, numbers)
        self._elapsed_s += time.perf_counter() - start

    def ask(self, handle: Any, concurrency: int, prompts: Sequence[str], numbers: Sequence[int]) -> dict[int, Any]:
        """Returns the images by number. Each client sends its next request when the one before is answered."""
        made: dict[int, Any] = {}
        waiting = iter(numbers)

        async def client() -> None:
            for number in waiting:
                [made[number]] = await handle.generate.remote(prompt=prompts[number], seed=number, **self._fields)

        async def all_clients() -> None:
            await asyncio.gather(*(client() for _ in range(concurrency)))

        asyncio.run(all_clients())
        return made


def _row(name: str, ways: Mapping[int, Mapping[str, _Way]], scenes: Sequence[Scene]) -> Row:
    """Returns one tier's row. scenes: what the prompts describe; empty if the grader does not know the model."""
    images, lossless = (_all_pixels(ways, each) for each in (name, BASELINE))
    forwards = ways[1][name].pictures[0].denoised.forwards
    row: dict[str, Any] = {"tier": name, "forwards": forwards.computed, "of": forwards.asked}
    for concurrency, of in ways.items():
        row[f"requests_per_s_{concurrency}"] = of[name].requests_per_s
        row[f"speedup_{concurrency}"] = of[name].requests_per_s / of[BASELINE].requests_per_s
    row["psnr_db"] = statistics.median(_psnr(images[number], lossless[number]) for number in images)
    if scenes:
        grades = [grade(images[number], scene) for number, scene in enumerate(scenes)]
        row |= {aspect: sum(getattr(one, aspect) for one in grades) / len(grades) for aspect in ASPECTS}
    return row


def _all_pixels(ways: Mapping[int, Mapping[str, _Way]], name: str) -> dict[int, Pixels]:
    """Returns the images of a tier at every concurrency, by number."""
    return {number: _pixels(picture) for of in ways.values() for number, picture in of[name].pictures.items()}


def _pixels(picture: Any) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(picture.media.data)).convert("RGB"))


def _psnr(one: Pixels, other: Pixels) -> float:
    """Returns the PSNR in dB; 99 for equal images."""
    error = float(((one.astype(float) - other) ** 2).mean())
    return 99.0 if error == 0 else 10 * float(np.log10(255**2 / error))


def _error(psnr_db: float) -> float:
    """Returns the root mean square error, on a scale of 255."""
    return 0.0 if psnr_db >= 99 else 255 / 10 ** (psnr_db / 20)


def _config(model: str) -> AppConfig:
    defaults = (
        {"width": 128, "height": 128, "true_cfg_scale": 1.5, "negative_prompt": ""} if model == SHAPES else {}
    )
    return parse_app_config(
        {
            "model": {"name": "tiers", "checkpoint": model, "defaults": defaults},
            "encoder": {"num_cpus": 0.1, "torch_threads": 1, "max_sequence_length": 32},
            "transformer": {"num_cpus": 0.1, "torch_threads": 1},
            "vae": {"num_cpus": 0.1, "torch_threads": 1},
        }
    )
