"""Writes modular checkpoints that refer to the components of a classic tiny checkpoint in another folder."""

import json
from pathlib import Path

import diffusers

from deployments.checkpoints.components import component_names, read_index
from deployments.checkpoints.modular import BLOCKS, MODULAR_INDEX
from deployments.checkpoints.source import fetch_checkpoint
from serve_app.commands.families_docs import OVER_CLASSIC


def write_modular(pipeline_class: str, folder: Path) -> Path:
    """Writes the index, the only file of the checkpoint's own folder."""
    classic = fetch_checkpoint(f"tiny://{OVER_CLASSIC[pipeline_class]}", ())
    index = dict(read_index(classic))
    for name in component_names(index):
        where = {"pretrained_model_name_or_path": str(classic), "subfolder": name}
        index[name] = [*index[name], {"type_hint": index[name], **where, "variant": None, "revision": None}]
    blocks = getattr(diffusers, pipeline_class).default_blocks_name
    folder.mkdir()
    told = index | {"_class_name": pipeline_class, BLOCKS: blocks}
    (folder / MODULAR_INDEX).write_text(json.dumps(told))
    return folder
