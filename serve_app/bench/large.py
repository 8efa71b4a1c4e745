"""Writes checkpoints of published sizes with random weights in bf16, without a download.

The sizes are those of the published configs; vocabularies and tokenizers are those of the tiny checkpoint.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from cluster.machines import accelerator
from deployments.checkpoints.source import fetch_checkpoint
from serve_app.bench.draw import write_weights

Settings = Mapping[str, Any]

PUBLISHED: Mapping[str, Mapping[str, Settings]] = {
    "flux": {
        "text_encoder": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "projection_dim": 768,
        },
        "text_encoder_2": {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64},
        "transformer": {
            "num_layers": 19,
            "num_single_layers": 38,
            "num_attention_heads": 24,
            "attention_head_dim": 128,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "axes_dims_rope": (16, 56, 56),
        },
        "vae": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32},
    },
    "qwen-image": {
        "text_encoder": {
            "text_config": {
                "hidden_size": 3584,
                "intermediate_size": 18944,
                "num_hidden_layers": 28,
                "num_attention_heads": 28,
                "num_key_value_heads": 4,
                "rope_parameters": {
                    "rope_type": "default",
                    "mrope_section": [16, 24, 24],
                    "rope_theta": 1_000_000.0,
                },
            },
            "vision_config": {
                "depth": 32,
                "hidden_size": 1280,
                "intermediate_size": 3420,
                "num_heads": 16,
                "out_hidden_size": 3584,
                "fullatt_block_indexes": [7, 15, 23, 31],
            },
        },
        "transformer": {
            "num_layers": 60,
            "num_attention_heads": 24,
            "attention_head_dim": 128,
            "joint_attention_dim": 3584,
            "axes_dims_rope": (16, 56, 56),
        },
        "vae": {"base_dim": 96, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2},
    },
}
"""Settings of FLUX.1-dev and Qwen-Image that differ from the tiny checkpoint, by family and component."""


MEMORY_FOLDER = Path("/dev/shm")
SPARE_BYTES = 10 * 2**30
"""Host memory to leave free for processes and loading, beside files written there and a pinned copy of them."""


def write_large(
    family: str,
    folder: Path,
    sizes: Mapping[str, Settings],
    device: torch.device,
    *,
    in_memory: Path | None = None,
    deadline: float | None = None,
) -> None:
    """Writes a checkpoint in diffusers' layout: 34 GB for FLUX, 57 GB for Qwen-Image. Draws weights on `device`.

    in_memory: a folder in host memory, for components that fit there. Raises OSError if a component fits nowhere,
    OutOfTime at `deadline`.
    """
    tiny = fetch_checkpoint(f"tiny://{family}", ())
    shutil.copytree(tiny, folder)
    for name, settings in sizes.items():
        shutil.rmtree(folder / name)
        with _in_bf16(), torch.device("meta"):
            model = build_model(tiny, name, settings)
        num_bytes = sum(parameter.nbytes for parameter in model.parameters())
        place = _find_room(name, num_bytes, folder, in_memory) / name
        write_weights(model, place, device, deadline=deadline)
        if place.parent != folder:
            (folder / name).symlink_to(place)
        accelerator.empty_cache(device)


def _find_room(name: str, num_bytes: int, folder: Path, in_memory: Path | None) -> Path:
    """Returns the folder for a component. Host memory must fit it twice: the files, and the stage's copy."""
    room = (_available_bytes() - SPARE_BYTES) // 2
    if in_memory is not None and min(room, shutil.disk_usage(in_memory).free) > num_bytes:
        return in_memory
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OSError(
            f"{name} takes {num_bytes / 1e9:.0f} GB, but {folder} has {free / 1e9:.0f} GB free, and host memory "
            "has no room for the files and a copy of them; set TMPDIR to a larger disk"
        )
    return folder


def _available_bytes() -> int:
    """Returns Linux's MemAvailable, the free host memory including caches that can be dropped."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return int(dict(line.split(":") for line in lines)["MemAvailable"].split()[0]) * 2**10


def build_model(tiny: Path, name: str, settings: Settings) -> Any:
    """Builds one component of a tiny checkpoint with other settings and random weights."""
    library, class_name = json.loads((tiny / "model_index.json").read_text())[name]
    build = _build_diffusers if library == "diffusers" else _build_transformers
    return build(class_name, tiny / name, settings)


@contextmanager
def _in_bf16() -> Iterator[None]:
    """Creates parameters in bf16 while the context lasts."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _build_diffusers(class_name: str, tiny: Path, settings: Settings) -> Any:
    model_class: Any = getattr(diffusers, class_name)
    return model_class.from_config({**model_class.load_config(tiny), **settings})


def _build_transformers(class_name: str, tiny: Path, settings: Settings) -> Any:
    model_class: Any = getattr(transformers, class_name)
    values = model_class.config_class.from_pretrained(tiny).to_dict()
    for key, value in settings.items():
        values[key] = {**values[key], **value} if isinstance(value, Mapping) else value
        if isinstance(value, Mapping):
            values[key].pop("layer_types", None)  # has one entry per layer, derived from the number of layers
    return model_class(model_class.config_class.from_dict(values))
