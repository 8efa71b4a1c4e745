"""The trained weights in the package draw what the prompt says."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline

from deployments.checkpoints.source import fetch_checkpoint
from deployments.training.shapes.grader import Grade, grade
from deployments.training.shapes.scene import Scene, Thing, random_scene
from deployments.training.shapes.wording import describe_unseen

NUM_PROMPTS, NUM_THOROUGH = 40, 200
BATCH = 40
STEPS = 8
GUIDANCE = 1.5
MAX_BYTES = 16_000_000
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


@pytest.fixture(scope="module")
def grades(pipeline: Any, request: pytest.FixtureRequest) -> list[tuple[Grade, str]]:
    """Grades images of scenes that training never saw, described in wordings that it never saw."""
    num_prompts = NUM_THOROUGH if request.config.getoption("--thorough") else NUM_PROMPTS
    rng = np.random.default_rng(2026)
    scenes = [random_scene(rng, is_held_out=True) for _ in range(num_prompts)]
    prompts = [describe_unseen(scene, rng) for scene in scenes]
    graded = []
    torch.set_num_threads(2)
    for start in range(0, num_prompts, BATCH):
        batch = slice(start, start + BATCH)
        images = draw(pipeline, prompts[batch], seed=start)
        graded += [grade(image, scene) for image, scene in zip(images, scenes[batch], strict=True)]
    torch.set_num_threads(1)
    return list(zip(graded, prompts, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("aspect", "at_least"),
    [("color", 0.98), ("place", 0.97), ("shape", 0.90), ("size", 0.90), ("background", 0.98)],
)
def test_unseen_prompts_are_drawn_right(grades: list[tuple[Grade, str]], aspect: str, at_least: float) -> None:
    wrong = [prompt for graded, prompt in grades if not getattr(graded, aspect)]
    assert 1 - len(wrong) / len(grades) >= at_least, wrong


def test_the_example_is_drawn_from_every_seed(pipeline: Any) -> None:
    images = draw(pipeline, [EXAMPLE] * 8, seed=1)
    assert [grade(image, EXAMPLE_SCENE).is_right for image in images] == [True] * 8
    assert len({image.tobytes() for image in images}) == 8


def test_the_stored_files_are_small(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES
    assert {path.name for path in files if path.suffix not in {".json", ".txt", ".safetensors"}} == set()
