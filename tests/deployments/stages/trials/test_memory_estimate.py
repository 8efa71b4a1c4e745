"""The memory that a decode needs, estimated before it runs."""

from dataclasses import replace

import torch

from deployments.families import Geometry
from deployments.request import MediaSize
from deployments.stages.trials.memory_estimate import decode_inputs

OF_FRAMES = Geometry(
    width=64, height=64, size_multiple=8, latent_pixels=8, latent_channels=4, num_frames=16, frames_per_decode=14
)
"""Geometry of a video model whose VAE decodes images."""


def shapes(of: Geometry, size: MediaSize) -> list[tuple[int, ...]]:
    return [tuple(inputs.shape) for inputs in decode_inputs({}, of, size, torch.float32)]


def test_frames_are_decoded_as_many_at_once_as_the_pipeline_gives() -> None:
    assert shapes(OF_FRAMES, MediaSize(64, 48, 30)) == [(14, 4, 6, 8), (14, 4, 6, 8), (2, 4, 6, 8)]
    assert shapes(OF_FRAMES, MediaSize(64, 48, 3)) == [(3, 4, 6, 8)]


def test_a_vae_that_knows_time_decodes_a_video_in_one_call() -> None:
    assert shapes(replace(OF_FRAMES, frames_per_decode=None, frame_stride=4), MediaSize(64, 48, 17)) == [
        (1, 4, 5, 6, 8)
    ]


def test_a_picture_is_one_call() -> None:
    assert shapes(replace(OF_FRAMES, frames_per_decode=None, num_frames=1), MediaSize(64, 48)) == [(1, 4, 6, 8)]
