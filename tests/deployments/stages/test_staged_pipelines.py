"""Every kind of call of every tiny checkpoint: three stages draw what the plain pipeline draws, bit for bit."""

from dataclasses import replace
from functools import cache
from itertools import islice
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from deployments.checkpoints.components import ModelIndex, needed_names, read_index
from deployments.checkpoints.derived import read_derived
from deployments.checkpoints.source import fetch_checkpoint
from deployments.checkpoints.tiny.names import TINY_FAMILIES, TINY_MODULES
from deployments.config import ModelConfig
from deployments.families.calls import find_calls, known_calls
from deployments.request import CallKind, GenerationRequest, InputPictures, Prompt
from deployments.stages.call import call_arguments
from deployments.stages.derive import Derived
from deployments.video_file import read_frames
from serve_app.families_docs import CANNOT, UNSTAGED
from tests.deployments.variants import build_request, draw_staged, read_model
from tests.pictures import half_mask, picture, png, video

QUICK = frozenset(
    {
        "flux",
        "sdxl",
        "qwen-image",
        "flux-fill",
        "flux2-klein",
        "z-image",
        "hunyuan-image",
        "wan",
        "wan21-i2v",
        "cogvideox",
        "ltx-video",
        "sd15-controlnet",
    }
)
"""Without --thorough: one of each kind of call, and those whose calls are unlike others'."""
STAGED = [name for name in TINY_MODULES if name not in UNSTAGED]


def index_of(name: str) -> ModelIndex:
    return read_index(fetch_checkpoint(f"tiny://{name}", ()))


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
    if "staged" in metafunc.fixturenames:
        is_thorough = metafunc.config.getoption("--thorough")
        metafunc.parametrize("staged", [name for name in STAGED if is_thorough or name in QUICK])


def small_request(name: str, kind: CallKind) -> GenerationRequest:
    call, geometry = model(name).architecture.calls[kind], model(name).geometry
    side = max(64, 4 * geometry.size_multiple)
    width, height = side, side + (0 if call.max_images else geometry.size_multiple)
    if geometry.sizes:
        by_shape = sorted(geometry.sizes, key=lambda size: abs(size[0] - size[1]))
        width, height = by_shape[0 if call.max_images else 1]  # pictures here are square
    usual = call.defaults.num_inference_steps
    few = min(3, usual)
    negative = "blurry" if "negative_prompt" in call.parameters else None
    request = replace(
        build_request(model(name), kind),
        prompt=Prompt("a red cat", negative, is_guided=True),
        width=width,
        height=height,
        num_frames=2 * geometry.frame_stride + 1 if call.media == "video" else 1,
        num_inference_steps=few if "guidance_schedule" not in call.parameters else usual,
    )
    steps = min(4, usual)
    return replace(request, strength=0.75, num_inference_steps=steps) if call.defaults.strength else request


@pytest.mark.filterwarnings("ignore:In CPU autocast")  # Mochi computes its rotary embeddings in float32
def test_three_stages_draw_what_the_plain_pipeline_draws(staged: str) -> None:
    offered = model(staged).architecture.calls
    index = index_of(staged)
    for kind, call in known_calls(find_calls(index["_class_name"]), needed_names(index)).items():
        if kind in offered:
            check_equal(staged, kind)
        else:
            assert call.pipeline_class in CANNOT


def check_equal(name: str, kind: CallKind) -> None:
    request, call = small_request(name, kind), model(name).architecture.calls[kind]
    images = [picture(seed, request.width) for seed in range(min(2, call.max_images))]
    mask = half_mask(request.width) if kind == "inpaint" else None
    control = picture(9, request.width) if call.control else None
    film = video(request.num_frames + 3, (96, 80)) if call.takes_video else None
    given = {"mask": mask, "control": control}
    files = InputPictures(
        tuple(map(png, images)), **{key: image and png(image) for key, image in given.items()}, video=film
    )
    frames = draw_staged(model(name), request, files if images or control or film else None)
    asked = {"image": images if len(images) > 1 else images[0]} if images else {}
    asked |= {"mask_image": mask} if mask else {}
    asked |= {call.control: control} if control else {}
    asked |= {"video": list(islice(read_frames(film), request.num_frames))} if film else {}
    np.testing.assert_array_equal(frames, draw_plain(name, request, asked), err_msg=f"{name}, {kind}")


@torch.no_grad()
def draw_plain(name: str, request: GenerationRequest, pictures: dict[str, Any]) -> np.ndarray:
    """[F, H, W, 3] by the class that diffusers has for this kind of call. pictures: by its arguments' names."""
    of = model(name).architecture
    pipeline_class: Any = getattr(diffusers, of.calls[request.kind].pipeline_class)
    pipe = load_plain(name)
    pipe = pipe if type(pipe) is pipeline_class else pipeline_class.from_pipe(pipe)
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(request.seed)
    made = np.asarray(pipe(**call_arguments(pipeline_class, request, of.max_sequence_length) | pictures)[0])
    return (made.reshape(-1, *made.shape[-3:]) * 255).round().astype(np.uint8)
