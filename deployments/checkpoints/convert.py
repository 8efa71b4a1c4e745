"""Converts one component of a single file to diffusers' layout, with diffusers' own `from_single_file`.

    python -m deployments.checkpoints.convert FILE LAYOUT COMPONENT OUT_FOLDER DTYPE

Runs in a process of its own, so that its memory is freed. It needs at most the component's size, because the file
is mapped.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import pipelines
from diffusers.loaders.single_file import load_single_file_sub_model
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from diffusers.loaders.single_file_utils import (
    is_clip_model_in_single_file,
    is_t5_in_single_file,
    load_single_file_checkpoint,
)

from deployments.memory.unread import refuse_unread


def convert(file: Path, layout: Path, name: str, out_folder: Path, dtype: torch.dtype) -> None:
    """Converts a component. Raises ValueError if its weights do not match its config in `layout`."""
    library, class_name = json.loads((layout / "model_index.json").read_text(encoding="utf-8"))[name]
    model_class: Any = getattr(importlib.import_module(library), class_name)
    checkpoint = load_single_file_checkpoint(str(file))
    with refuse_unread(file):
        if library == "transformers" and not _is_renamed(model_class, checkpoint):
            model = _load_transformers(model_class, checkpoint, layout, name, dtype)
        elif library == "transformers" or _is_loadable(model_class):
            model = load_single_file_sub_model(
                library_name=library,
                class_name=class_name,
                name=name,
                checkpoint=checkpoint,
                pipelines=pipelines,
                is_pipeline_module=False,
                cached_model_config_path=str(layout),
                local_files_only=True,
                torch_dtype=dtype,
            )
        else:  # load_single_file_sub_model would take the layout's own weights
            raise ValueError(f"diffusers cannot read {class_name} from a single file")
    missing = sorted(key for key, tensor in model.state_dict().items() if tensor.is_meta)
    if missing:
        raise ValueError(f"it lacks weights that {class_name} needs: {missing[0]} ({len(missing)} in all)")
    model.save_pretrained(out_folder)


def _is_loadable(model_class: Any) -> bool:
    return any(issubclass(model_class, getattr(diffusers, name)) for name in SINGLE_FILE_LOADABLE_CLASSES)


def _is_renamed(model_class: Any, checkpoint: dict[str, torch.Tensor]) -> bool:
    """Whether the file holds a whole model, in which a text encoder's tensors have other names."""
    if model_class.__name__ == "T5EncoderModel":
        return bool(is_t5_in_single_file(checkpoint))
    return bool(is_clip_model_in_single_file(model_class, checkpoint))


def _load_transformers(
    model_class: Any, checkpoint: dict[str, torch.Tensor], layout: Path, name: str, dtype: torch.dtype
) -> Any:
    """Loads a file that holds only this text encoder, under transformers' tensor names."""
    config = model_class.config_class.from_pretrained(layout, subfolder=name)
    model, keys = model_class.from_pretrained(
        None, config=config, state_dict=checkpoint, dtype=dtype, output_loading_info=True
    )
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found := sorted(map(str, keys[fault])):
            raise ValueError(f"it belongs to another model: {fault} of {model_class.__name__}: {found[0]}")
    return model


if __name__ == "__main__":
    diffusers.utils.logging.set_verbosity_error()
    try:
        convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), getattr(torch, sys.argv[5]))
    except Exception as error:  # diffusers' key mappings raise errors of any type on other models' files
        sys.exit(" ".join(f"{type(error).__name__}: {error}".split()))
