"""Every kind of call of every tiny checkpoint: three processes draw what the plain pipeline draws, bit for bit,
and make the same sound."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from deployments.checkpoints.components import ModelIndex, needed_names, read_index
from deployments.checkpoints.derived import read_derived
from deployments.checkpoints.source import fetch_checkpoint
from deployments.checkpoints.tiny.names import TINY_FAMILIES, TINY_MODULES
from deployments.config.model import ModelConfig
from deployments.errors import WrongField
from deployments.families import Geometry
from deployments.families.calls import Call, find_calls, known_calls
from deployments.media.video_file import read_frames
from deployments.request import CallKind, GenerationRequest, InputPictures, Prompt
from deployments.stages.call_arguments import call_arguments
from deployments.stages.trials.derive import ALL_FRAMES, Derived
from deployments.stages.warm_up import tried_size
from serve_app.commands.families_docs import CANNOT, OVER_CLASSIC
from tests.deployments import plain
from tests.deployments.modular_checkpoint import write_modular
from tests.deployments.stage_processes import StageProcesses
from tests.deployments.variants import build_request, denoise, encode, load_denoising, read_model
from tests.pictures import half_mask, picture, png, video

QUICK = frozenset(
    {
        "flux",
        "flux-fill",
        "flux2-klein",
        "z-image",
        "hunyuan-image",
        "wan",
        "latte",
        "sd15-controlnet",
    }
)
"""Checkpoints tested without --thorough: one of each kind of call, and those with unusual calls."""


def folder_of(name: str) -> Path:
    """Returns a checkpoint's folder.

    name: the name of a tiny checkpoint, or a path.
    """
    return fetch_checkpoint(name if "/" in name else f"tiny://{name}", ())


def index_of(name: str) -> ModelIndex:
    return read_index(folder_of(name))


@cache
def model(name: str) -> ModelConfig:
    folder = folder_of(name)
    if name in TINY_FAMILIES:
        return read_model(folder)
    derived = read_derived(index_of(name)["_class_name"], Derived(folder).describe())
    return ModelConfig(name=name, checkpoint=str(folder)).with_derived_family(*derived)


def calls_of(name: str) -> Mapping[CallKind, Call]:
    """Returns all kinds of call that diffusers has for the checkpoint's components."""
    told, index = model(name).architecture.told, index_of(name)
    return told or known_calls(find_calls(index["_class_name"]), needed_names(index))


@cache
def load_plain(name: str) -> Any:
    return plain.load_plain(folder_of(name))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "staged" in metafunc.fixturenames:
        is_thorough = metafunc.config.getoption("--thorough")
        metafunc.parametrize("staged", [name for name in TINY_MODULES if is_thorough or name in QUICK])
    if "blocks" in metafunc.fixturenames:
        is_thorough = metafunc.config.getoption("--thorough")
        metafunc.parametrize("blocks", OVER_CLASSIC if is_thorough else [next(iter(OVER_CLASSIC))])


@pytest.fixture(scope="module")
def processes() -> Iterator[StageProcesses]:
    processes = StageProcesses()
    yield processes
    processes.end()


def small_request(name: str, kind: CallKind) -> GenerationRequest:
    call, geometry = model(name).architecture.calls[kind], model(name).geometry
    side = max(64, 4 * geometry.size_multiple)
    width, height = side, side + (0 if call.max_images else geometry.size_multiple)
    if geometry.sizes:
        by_shape = sorted(geometry.sizes, key=lambda size: abs(size[0] - size[1]))
        width, height = by_shape[0 if call.max_images else 1]  # input images here are square
    usual = call.defaults.num_inference_steps
    few = min(3, usual)
    negative = "blurry" if "negative_prompt" in call.parameters else None
    request = replace(
        build_request(model(name), kind),
        prompt=Prompt("a red cat", negative, is_guided=True),
        width=width,
        height=height,
        num_frames=_some_frames(geometry) if call.media == "video" else 1,
        num_inference_steps=few if "guidance_schedule" not in call.parameters else usual,
    )
    steps = min(4, usual)
    return replace(request, strength=0.75, num_inference_steps=steps) if call.defaults.strength else request


def _some_frames(of: Geometry) -> int:
    """Returns a number of frames; where a decode takes only a few at once, more than that."""
    if of.frames_per_decode in (None, ALL_FRAMES):
        return tried_size(of).num_frames
    return math.ceil(of.frames_per_decode / of.frame_stride) * of.frame_stride + 1


@pytest.mark.filterwarnings("ignore:In CPU autocast")  # Mochi computes its rotary embeddings in float32
def test_three_processes_draw_what_the_plain_pipeline_draws(processes: StageProcesses, staged: str) -> None:
    offered = model(staged).architecture.calls
    for kind, call in calls_of(staged).items():
        assert (kind in offered) == (call.pipeline_class not in CANNOT)
        if kind in offered:
            check_equal(processes, staged, kind)


def test_frames_that_a_denoiser_has_no_positions_for_are_the_requests_fault() -> None:
    """Latte takes 16 frames, or one."""
    request = replace(small_request("latte", "generate"), num_frames=31)
    stage = load_denoising(model("latte"))
    try:
        with pytest.raises(WrongField) as raised:
            denoise(stage, encode(model("latte"), request), request)
    finally:
        stage.close()
    assert raised.value.param == "num_frames"


def test_blocks_over_a_classic_checkpoint_draw_what_they_draw_whole(
    processes: StageProcesses, blocks: str, tmp_path: Path
) -> None:
    name = str(write_modular(blocks, tmp_path / "checkpoint"))
    assert model(name).architecture.calls.keys() == calls_of(name).keys()
    for kind in calls_of(name):
        check_equal(processes, name, kind)


def check_equal(processes: StageProcesses, name: str, kind: CallKind) -> None:
    request, call = small_request(name, kind), model(name).architecture.calls[kind]
    images = [picture(seed, request.width) for seed in range(min(2, call.max_images))]
    mask = half_mask(request.width) if kind == "inpaint" else None
    control = picture(9, request.width) if call.control else None
    film = video(request.num_frames + 3, (96, 80)) if call.takes_video else None
    given = {"mask": mask, "control": control}
    files = InputPictures(
        tuple(map(png, images)), **{key: image and png(image) for key, image in given.items()}, video=film
    )
    frames, sound = processes.draw(model(name), request, files if images or control or film else None)
    asked = {"image": images if len(images) > 1 else images[0]} if images else {}
    asked |= {"mask_image": mask} if mask else {}
    asked |= {call.control: control} if control else {}
    asked |= {"video": list(islice(read_frames(film), request.num_frames))} if film else {}
    plain_frames, plain_sound = draw_plain(name, request, asked)
    np.testing.assert_array_equal(frames, plain_frames, err_msg=f"{name}, {kind}")
    assert (sound is None) == (plain_sound is None)
    if sound is not None:
        np.testing.assert_array_equal(sound.samples, plain_sound, err_msg=f"{name}, {kind}")


@torch.no_grad()
def draw_plain(
    name: str, request: GenerationRequest, pictures: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns frames [F, H, W, 3] and sound [channels, samples], drawn by diffusers' class for this kind of call.

    pictures: input images, by argument name.
    """
    of = model(name).architecture
    pipeline_class: Any = getattr(diffusers, of.calls[request.kind].pipeline_class)
    pipe = load_plain(name)
    pipe = pipe if type(pipe) is pipeline_class else pipeline_class.from_pipe(pipe)
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(request.seed)
    arguments = call_arguments(pipe, request, of.max_sequence_length) | pictures
    made, sound = plain.draw(pipe, **arguments)
    made = np.asarray(made)
    frames = (made.reshape(-1, *made.shape[-3:]) * 255).round().astype(np.uint8)
    return frames, None if sound is None else np.atleast_2d(np.asarray(sound[0]))
