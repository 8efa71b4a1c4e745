"""Tiny pipelines that edit images with Qwen-Image: its components, and a processor that reads the images."""

from typing import Any

from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline

from deployments.checkpoints.tiny.families import build_qwen_image
from deployments.checkpoints.tiny.vision import build_qwen_processor


def build_qwen_image_edit() -> QwenImageEditPipeline:
    """Qwen-Image-Edit: one image, scaled to 1024 x 1024 pixels whatever its size."""
    return QwenImageEditPipeline(**_build_parts())


def build_qwen_image_edit_plus() -> QwenImageEditPlusPipeline:
    """Qwen-Image-Edit-2509: several images."""
    return QwenImageEditPlusPipeline(**_build_parts())


def _build_parts() -> dict[str, Any]:
    parts: dict[str, Any] = build_qwen_image().components
    return parts | {"processor": build_qwen_processor(parts["tokenizer"])}
