"""Writes one component of a single file in diffusers' layout, by diffusers' own `from_single_file`.

    python -m deployments.checkpoints.convert FILE LAYOUT COMPONENT OUT_FOLDER DTYPE

In a process of its own, whose memory goes with it. It is at most that of the component, for the file is mapped.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import pipelines
from diffusers.loaders.single_file import load_single_file_sub_model
from diffusers.loaders.single_file_utils import load_single_file_checkpoint


def convert(file: Path, layout: Path, name: str, out_folder: Path, dtype: torch.dtype) -> None:
    """Raises ValueError if the file has not all weights that the component's config in `layout` needs."""
    library, class_name = json.loads((layout / "model_index.json").read_text(encoding="utf-8"))[name]
    model: Any = load_single_file_sub_model(
        library_name=library,
        class_name=class_name,
        name=name,
        checkpoint=load_single_file_checkpoint(str(file)),
        pipelines=pipelines,
        is_pipeline_module=False,
        cached_model_config_path=str(layout),
        local_files_only=True,
        torch_dtype=dtype,
    )
    missing = sorted(key for key, tensor in model.state_dict().items() if tensor.is_meta)
    if missing:
        raise ValueError(f"it lacks weights that {class_name} needs: {missing[0]} ({len(missing)} such)")
    shutil.rmtree(out_folder, ignore_errors=True)
    model.save_pretrained(out_folder)


if __name__ == "__main__":
    diffusers.utils.logging.set_verbosity_error()
    try:
        convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), getattr(torch, sys.argv[5]))
    except Exception as error:  # mappings fail as they like on a file of another model
        sys.exit(" ".join(f"{type(error).__name__}: {error}".split()))
