"""Loads transformers' processors of texts and images, with or without torchvision.

Without torchvision transformers reads images with Pillow, but cannot build a processor that has a part for videos
(those of the Qwen-VL family). Pipelines pass no videos to a processor, so that part is then replaced by one that
holds its settings only.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoImageProcessor, AutoTokenizer, processing_utils
from transformers.utils import is_torchvision_available
from transformers.video_processing_utils import VideoProcessorMixin

_VIDEOS = "video_processor"
_PARTS = {"image_processor": AutoImageProcessor, "tokenizer": AutoTokenizer, _VIDEOS: VideoProcessorMixin}


def is_processor(entry: Sequence[str]) -> bool:
    """Whether a component is a processor. entry: [library, class] from the checkpoint's index."""
    library, class_name = entry
    return library == "transformers" and class_name.endswith("Processor")


def load_processor(folder: Path, class_name: str) -> Any:
    """Loads a processor of this class of transformers from `folder`. Raises the errors of `from_pretrained`."""
    processor_class: Any = getattr(transformers, class_name)
    if is_torchvision_available() or _VIDEOS not in _part_names(processor_class):
        return processor_class.from_pretrained(folder, local_files_only=True)
    loaders = [_PARTS[name] for name in _part_names(processor_class)]
    parts = [loader.from_pretrained(folder, local_files_only=True) for loader in loaders]
    settings, _ = processor_class.get_processor_dict(folder, local_files_only=True)
    return build_processor(processor_class, parts, settings)


def build_processor(processor_class: Any, parts: list[Any], settings: dict[str, Any]) -> Any:
    """Builds a processor. parts: in the order of its class's arguments; VideoProcessorMixin only has settings."""
    _declare_video_processors()
    return processor_class.from_args_and_dict(parts, settings)


def _part_names(processor_class: Any) -> list[str]:
    return processor_class.get_attributes() if hasattr(processor_class, "get_attributes") else []


@cache
def _declare_video_processors() -> None:
    """Adds VideoProcessorMixin to transformers' module: processors look up the class of their video part there,
    and do not find it without torchvision."""
    library = processing_utils.transformers_module
    if not hasattr(library, VideoProcessorMixin.__name__):
        setattr(library, VideoProcessorMixin.__name__, VideoProcessorMixin)
