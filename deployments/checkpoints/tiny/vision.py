"""Tiny image encoders, and the processors that prepare images for them."""

from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen3VLProcessor,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.video_processing_utils import VideoProcessorMixin

from deployments.checkpoints.processors import build_processor
from deployments.checkpoints.tiny.sizes import VISION

_PIXELS = {"shortest_edge": 56 * 56, "longest_edge": 56 * 56}
"""Pixels of an image for Qwen2.5-VL: 4 tokens."""


def build_qwen_processor(tokenizer: Qwen2Tokenizer) -> Qwen2VLProcessor:
    """Qwen2.5-VL's processor. Its video part is named in its files, but only has settings."""
    videos = VideoProcessorMixin(video_processor_type="Qwen2VLVideoProcessor", size=_PIXELS)
    return build_processor(Qwen2VLProcessor, [Qwen2VLImageProcessorPil(size=_PIXELS), tokenizer, videos], {})


def build_qwen3_processor(tokenizer: Qwen2Tokenizer) -> Qwen3VLProcessor:
    """Qwen3-VL's processor, with the tokenizer's chat template."""
    videos = VideoProcessorMixin(video_processor_type="Qwen3VLVideoProcessor", size=_PIXELS)
    parts = [Qwen2VLImageProcessorPil(size=_PIXELS), tokenizer, videos]
    return build_processor(Qwen3VLProcessor, parts, {"chat_template": tokenizer.chat_template})


def build_clip_vision() -> tuple[CLIPImageProcessor, CLIPVisionModel]:
    """CLIP's vision model, which embeds the first frame of Wan 2.1."""
    config = CLIPVisionConfig(**VISION | {"num_hidden_layers": 2, "num_attention_heads": 4})
    return CLIPImageProcessor(size=32, crop_size=32), CLIPVisionModel(config)


def build_siglip() -> tuple[SiglipImageProcessor, SiglipVisionModel]:
    """SigLIP, which embeds the first frame of HunyuanVideo 1.5."""
    return SiglipImageProcessor(size={"height": 32, "width": 32}), SiglipVisionModel(SiglipVisionConfig(**VISION))
