"""Processors load with the installed packages, and process images as transformers' own reference does."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import Qwen2VLImageProcessorPil, Qwen2VLProcessor
from transformers.utils import is_torchvision_available
from transformers.video_processing_utils import VideoProcessorMixin

from deployments.checkpoints.components import read_index
from deployments.checkpoints.processors import build_processor, is_processor, load_processor
from deployments.checkpoints.source import fetch_checkpoint
from deployments.checkpoints.tiny.language import build_chat_tokenizer
from deployments.checkpoints.tiny.text import build_qwen_tokenizer
from deployments.config.encoder import EncoderConfig
from deployments.stages.pipeline import load_pipeline

without_torchvision = pytest.mark.skipif(is_torchvision_available(), reason="transformers' own loading does it")

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (93, 150, 3), dtype=np.uint8))
PLACE = "<|vision_start|><|image_pad|><|vision_end|>"
PIXELS = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A processor's folder as in Qwen-Image-Edit's repository, from before transformers 5."""
    build_qwen_tokenizer().save_pretrained(tmp_path)
    pictures = {"image_processor_type": "Qwen2VLImageProcessorFast", "processor_class": "Qwen2VLProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(pictures | {"size": PIXELS}))
    videos = {"video_processor_type": "Qwen2VLVideoProcessor", "size": PIXELS}
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(videos))
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    return tmp_path


def load(folder: Path, class_name: str = "Qwen2VLProcessor") -> Any:
    with warnings.catch_warnings(action="ignore"):
        return load_processor(folder, class_name)


def test_a_published_processor_is_of_its_class_and_has_its_settings(published: Path) -> None:
    processor = load(published)
    assert type(processor) is Qwen2VLProcessor
    assert dict(processor.image_processor.size) == PIXELS
    assert processor.chat_template == "{{ messages }}"


@without_torchvision
def test_pixels_are_those_of_pillow_bit_by_bit_and_a_picture_is_as_many_tokens_as_it_has_patches(
    published: Path,
) -> None:
    inputs = load(published)(text=[f"a{PLACE}b{PLACE}"], images=[PICTURE, PICTURE.rotate(90, expand=True)])
    expected = Qwen2VLImageProcessorPil(size=PIXELS)([PICTURE, PICTURE.rotate(90, expand=True)])
    assert np.array_equal(inputs["pixel_values"], expected["pixel_values"])
    assert np.array_equal(inputs["image_grid_thw"], expected["image_grid_thw"])
    num_tokens = [int(grid.prod()) // 4 for grid in expected["image_grid_thw"]]
    pads = "<|image_pad|>"
    text = f"a{PLACE.replace(pads, pads * num_tokens[0])}b{PLACE.replace(pads, pads * num_tokens[1])}"
    assert list(inputs["input_ids"][0]) == build_qwen_tokenizer()(text)["input_ids"]


@without_torchvision
@pytest.mark.parametrize("class_name", ["Qwen2VLProcessor", "Qwen2_5_VLProcessor", "Qwen3VLProcessor"])
def test_what_was_saved_loads_alike(tmp_path: Path, class_name: str) -> None:
    parts = [
        Qwen2VLImageProcessorPil(size=PIXELS),
        build_chat_tokenizer(),
        VideoProcessorMixin(video_processor_type="Qwen2VLVideoProcessor"),
    ]
    saved = build_processor(getattr(transformers, class_name), parts, {})
    saved.save_pretrained(tmp_path)
    loaded = load(tmp_path, class_name)
    asked = {"text": [f"a{PLACE}"], "images": [PICTURE], "return_tensors": "pt"}
    one, other = saved(**asked), loaded(**asked)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert loaded.to_json_string() == saved.to_json_string()


@without_torchvision
def test_a_video_is_refused(published: Path) -> None:
    with pytest.raises(NotImplementedError):
        load(published)(text=["<|video_pad|>"], videos=[np.zeros((4, 3, 56, 56), np.uint8)])


@pytest.mark.parametrize("class_name", ["CLIPImageProcessor", "SiglipImageProcessor", "Siglip2ImageProcessor"])
def test_an_image_processor_loads_by_itself(tmp_path: Path, class_name: str) -> None:
    with warnings.catch_warnings(action="ignore"):
        getattr(transformers, class_name)(do_convert_rgb=True).save_pretrained(tmp_path)
    assert load(tmp_path, class_name)(PICTURE)["pixel_values"][0] is not None


@pytest.mark.parametrize(("name", "part"), [("qwen-image-edit", "processor"), ("kandinsky5", "tokenizer")])
def test_a_stage_loads_a_processor_by_whatever_name_the_pipeline_has_for_it(name: str, part: str) -> None:
    folder = fetch_checkpoint(f"tiny://{name}", ())
    index = read_index(folder)
    assert is_processor(index[part])
    with warnings.catch_warnings(action="ignore"):
        pipe = load_pipeline(folder, index, frozenset({part, "scheduler"}), EncoderConfig(), variant=None)
    assert type(getattr(pipe, part)).__name__ == index[part][1]
