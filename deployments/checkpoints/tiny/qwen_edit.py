"""Tiny pipelines that edit pictures with Qwen-Image: its parts, and a processor that reads the pictures."""

from typing import Any

from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline
from transformers import PaddleOCRVLProcessor, Qwen2VLImageProcessorPil

from deployments.checkpoints.tiny.families import build_qwen_image
from deployments.checkpoints.tiny.text import build_qwen_encoder, build_qwen_tokenizer

_PIXELS = 56 * 56
"""Of a picture as the text encoder sees it: 4 tokens."""


def build_qwen_image_edit() -> QwenImageEditPipeline:
    """Qwen-Image-Edit: one picture, scaled to 1024 x 1024 pixels whatever its size."""
    return QwenImageEditPipeline(**_build_parts())


def build_qwen_image_edit_plus() -> QwenImageEditPlusPipeline:
    """Qwen-Image-Edit-2509: several pictures."""
    return QwenImageEditPlusPipeline(**_build_parts())


def _build_parts() -> dict[str, Any]:
    """With a processor that does with texts and pictures what Qwen2.5-VL's does, whose half for videos needs
    torchvision.
    """
    parts: dict[str, Any] = build_qwen_image().components
    tokenizer = build_qwen_tokenizer(image_token="<|image_pad|>")
    pictures = Qwen2VLImageProcessorPil(min_pixels=_PIXELS, max_pixels=_PIXELS)
    return parts | {
        "tokenizer": tokenizer,
        "text_encoder": build_qwen_encoder(tokenizer),
        "processor": PaddleOCRVLProcessor(pictures, tokenizer),
    }
