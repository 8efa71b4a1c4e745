"""The trained weights in the package draw what the prompt says."""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline

from deployments.checkpoints.source import fetch_checkpoint
from deployments.training.shapes.grader import Grade, grade, outline_overlap
from deployments.training.shapes.scene import SIDE_BY_SIDE, Scene, Thing, random_scene
from deployments.training.shapes.wording import describe_unseen, describe_without_places

NUM_PROMPTS, NUM_THOROUGH = 40, 200
BATCH = 20
STEPS = 8
GUIDANCE = 1.5
MAX_BYTES = 16_000_000
MIN_OVERLAP = 0.92
"""Intersection over union of a drawn outline and the true one: at most half a pixel off, for a small shape."""
EXAMPLE = "a red circle on the left, on a white background"
EXAMPLE_SCENE = Scene((Thing("red", "circle", "left", "large"),), "white")


@pytest.fixture(scope="module")
def folder() -> Path:
    return fetch_checkpoint("embedded://shapes", ())


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    pipe = FluxPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipeline: Any, prompts: list[str], seed: int) -> Any:
    """Returns images [B, 128, 128, 3] in uint8, drawn with the quickstart's defaults."""
    images = pipeline(
        prompts,
        width=128,
        height=128,
        num_inference_steps=STEPS,
        max_sequence_length=32,
        true_cfg_scale=GUIDANCE,
        negative_prompt=[""] * len(prompts),
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).images
    return np.rint(images * 255).astype(np.uint8)


@dataclass(frozen=True)
class Drawn:
    """What was drawn for one prompt, and how well."""

    prompt: str
    grade: Grade
    overlap: float


def draw_all(pipeline: Any, scenes: list[Scene], prompts: list[str]) -> list[Drawn]:
    drawn = []
    torch.set_num_threads(2)
    for start in range(0, len(prompts), BATCH):
        batch = slice(start, start + BATCH)
        for image, scene, prompt in zip(
            draw(pipeline, prompts[batch], seed=start), scenes[batch], prompts[batch], strict=True
        ):
            drawn.append(Drawn(prompt, grade(image, scene), outline_overlap(image, scene)))
    torch.set_num_threads(1)
    return drawn


@pytest.fixture(scope="module")
def num_prompts(request: pytest.FixtureRequest) -> int:
    return NUM_THOROUGH if request.config.getoption("--thorough") else NUM_PROMPTS


@pytest.fixture(scope="module")
def with_places(pipeline: Any, num_prompts: int) -> list[Drawn]:
    """Images of scenes that training never saw, described in wordings that it never saw."""
    rng = np.random.default_rng(2026)
    scenes = [random_scene(rng, is_held_out=True) for _ in range(num_prompts)]
    return draw_all(pipeline, scenes, [describe_unseen(scene, rng) for scene in scenes])


@pytest.fixture(scope="module")
def without_places(pipeline: Any, num_prompts: int) -> list[Drawn]:
    """Such images of two shapes, whose descriptions say nothing of places."""
    rng = np.random.default_rng(2027)
    candidates = (random_scene(rng, is_held_out=True) for _ in itertools.count())
    side_by_side = (scene for scene in candidates if tuple(each.place for each in scene.things) == SIDE_BY_SIDE)
    scenes = list(itertools.islice(side_by_side, num_prompts))
    return draw_all(pipeline, scenes, [describe_without_places(scene, rng) for scene in scenes])


@pytest.mark.slow
@pytest.mark.parametrize("aspect", ["color", "place", "shape", "size", "background"])
def test_unseen_prompts_are_drawn_right(with_places: list[Drawn], aspect: str) -> None:
    wrong = [drawn.prompt for drawn in with_places if not getattr(drawn.grade, aspect)]
    assert len(wrong) <= 0.02 * len(with_places), wrong


@pytest.mark.slow
def test_outlines_are_sharp_and_true(with_places: list[Drawn]) -> None:
    wrong = [drawn.prompt for drawn in with_places if drawn.overlap < MIN_OVERLAP]
    assert len(wrong) <= 0.05 * len(with_places), wrong


@pytest.mark.slow
def test_two_shapes_without_places_are_drawn_side_by_side(without_places: list[Drawn]) -> None:
    wrong = [drawn.prompt for drawn in without_places if not drawn.grade.is_right]
    assert len(wrong) <= 0.05 * len(without_places), wrong


def test_the_example_is_drawn_from_every_seed(pipeline: Any) -> None:
    images = draw(pipeline, [EXAMPLE] * 8, seed=1)
    assert [grade(image, EXAMPLE_SCENE).is_right for image in images] == [True] * 8
    assert len({image.tobytes() for image in images}) == 8


def test_the_stored_files_are_small(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES
    assert {path.name for path in files if path.suffix not in {".json", ".txt", ".safetensors"}} == set()
