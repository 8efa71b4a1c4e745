"""Checkpoints saved as pipelines that only redraw videos."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from deployments.checkpoints.derived import read_derived
from deployments.config.model import ModelConfig
from deployments.media.video_file import read_frames
from deployments.request import InputPictures
from deployments.stages.trials.derive import Derived
from tests.deployments.variants import build_request, draw_plain, draw_staged, edit, write_tiny
from tests.pictures import video


@pytest.mark.thorough  # test_staged_pipelines tests the call itself
@pytest.mark.parametrize(
    ("tiny", "pipeline_class"),
    [("cogvideox", "CogVideoXVideoToVideoPipeline"), ("wan", "WanVideoToVideoPipeline")],
)
def test_one_that_was_saved_as_such_tells_its_sizes_and_draws_as_plain_diffusers(
    tmp_path: Path, tiny: str, pipeline_class: str
) -> None:
    folder = write_tiny(tiny, tmp_path / "x")
    edit(folder / "model_index.json", _class_name=pipeline_class)
    derived = read_derived(pipeline_class, Derived(folder).describe())
    model = ModelConfig(name=tiny, checkpoint=str(folder)).with_derived_family(*derived)
    assert list(model.architecture.calls) == ["video_to_video"]
    assert model.geometry.num_frames > 1
    film = video(12, (96, 80))
    request = build_request(model, num_frames=9, num_inference_steps=4, guidance_scale=1.0, strength=0.75)
    request = replace(request, prompt=replace(request.prompt, is_guided=False, negative_text=None))
    drawn = draw_staged(model, request, InputPictures(video=film))
    frames = list(islice(read_frames(film), 9))
    settings = {"video": frames, "strength": 0.75, "guidance_scale": 1.0}
    plain = draw_plain(folder, replace(request, num_frames=1), **settings)
    np.testing.assert_array_equal(drawn, plain)
