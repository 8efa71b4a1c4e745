"""Every kind of call of every tiny checkpoint: three stages draw what the plain pipeline draws, bit for bit."""

from dataclasses import replace
from functools import cache
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from deployments.checkpoints.derived import read_derived
from deployments.checkpoints.source import fetch_checkpoint
from deployments.checkpoints.tiny.names import TINY_FAMILIES, TINY_MODULES
from deployments.config import ModelConfig
from deployments.families.calls import find_calls
from deployments.request import CallKind, GenerationRequest, InputPictures, Prompt
from deployments.stages.call import call_arguments
from deployments.stages.derive import Derived
from serve_app.families_docs import CANNOT, UNSTAGED
from tests.deployments.variants import build_request, draw_staged, read_model
from tests.pictures import half_mask, picture, png

QUICK = frozenset(
    {
        "flux-kontext",
        "flux-fill",
        "flux2-klein",
        "chroma",
        "z-image",
        "sana-video",
        "hunyuan-image",
        "qwen-image-edit-plus",
        "wan21-i2v",
        "wan22-a14b",
        "ltx-video",
        *TINY_FAMILIES,
    }
)
"""Without --thorough: one of each kind of call, and those whose calls are unlike others'."""
STAGED = [name for name in TINY_MODULES if name not in UNSTAGED]


@cache
def index_of(name: str) -> dict[str, Any]:
    index: dict[str, Any] = diffusers.DiffusionPipeline.load_config(fetch_checkpoint(f"tiny://{name}", ()))
    return index


@cache
def model(name: str) -> ModelConfig:
    folder = fetch_checkpoint(f"tiny://{name}", ())
    if name in TINY_FAMILIES:
        return read_model(folder)
    derived = read_derived(index_of(name)["_class_name"], Derived(folder).describe())
    return ModelConfig(name=name, checkpoint=str(folder)).with_derived_family(*derived)


@cache
def load_plain(name: str) -> Any:
    folder = fetch_checkpoint(f"tiny://{name}", ())
    return diffusers.DiffusionPipeline.from_pretrained(folder, **UNREAD.get(name, {}))


UNREAD: dict[str, dict[str, None]] = {"longcat": {"text_processor": None}}
"""Components that need torchvision and that these calls do not."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kind" in metafunc.fixturenames:
        is_thorough = metafunc.config.getoption("--thorough")
        names = [name for name in STAGED if is_thorough or name in QUICK]
        metafunc.parametrize(("name", "kind"), [(name, kind) for name in names for kind in kinds(name)])


def kinds(name: str) -> tuple[CallKind, ...]:
    """That diffusers has for it: those that it cannot do are left out when it runs."""
    return tuple(find_calls(index_of(name)["_class_name"]))


def small_request(name: str, kind: CallKind) -> GenerationRequest:
    call, geometry = model(name).architecture.calls[kind], model(name).geometry
    side = max(64, 4 * geometry.size_multiple)
    negative = "blurry" if "negative_prompt" in call.parameters else None
    request = replace(
        build_request(model(name), kind),
        prompt=Prompt("a red cat", negative, is_guided=True),
        width=side,
        height=side,
        num_frames=geometry.frame_stride + 1 if call.media == "video" else 1,
        num_inference_steps=min(3, call.defaults.num_inference_steps),
    )
    return replace(request, strength=0.75, num_inference_steps=4) if call.defaults.strength else request


def test_three_stages_draw_what_the_plain_pipeline_draws(name: str, kind: CallKind) -> None:
    if kind not in model(name).architecture.calls:
        assert find_calls(index_of(name)["_class_name"])[kind].pipeline_class in CANNOT
        return
    request, call = small_request(name, kind), model(name).architecture.calls[kind]
    images = [picture(seed, request.width) for seed in range(min(2, call.max_images))]
    mask = half_mask(request.width) if kind == "inpaint" else None
    pictures = InputPictures(tuple(map(png, images)), mask and png(mask)) if images else None
    frames = draw_staged(model(name), request, pictures)
    np.testing.assert_array_equal(frames, draw_plain(name, request, images, mask))


@torch.no_grad()
def draw_plain(name: str, request: GenerationRequest, images: list[Any], mask: Any) -> np.ndarray:
    """[F, H, W, 3] by the class that diffusers has for this kind of call."""
    of = model(name).architecture
    pipeline_class: Any = getattr(diffusers, of.calls[request.kind].pipeline_class)
    pipe = load_plain(name)
    pipe = pipe if type(pipe) is pipeline_class else pipeline_class.from_pipe(pipe)
    pipe.set_progress_bar_config(disable=True)
    asked = call_arguments(pipeline_class, request, of.max_sequence_length)
    if images:
        asked["image"] = images if len(images) > 1 else images[0]
    if mask is not None:
        asked["mask_image"] = mask
    torch.manual_seed(request.seed)
    made = np.asarray(pipe(**asked)[0])
    return (made.reshape(-1, *made.shape[-3:]) * 255).round().astype(np.uint8)
