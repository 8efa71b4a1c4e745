"""Finds an adapter's file of weights and checks that it is a LoRA. Imports no torch."""

from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import snapshot_download

from deployments.checkpoints.source import asking_hub
from deployments.checkpoints.weights import find_file_faults, read_header
from deployments.options.adapter import WEIGHTS_SUFFIX, is_path

USUAL_NAME = "pytorch_lora_weights.safetensors"
"""Name under which diffusers saves a LoRA."""
OTHER_KINDS: Mapping[str, str] = {
    "lokr_": "a LoKr",
    "hada_": "a LoHa",
    "oft_": "an OFT",
    "dora_scale": "a DoRA",
    "lora_magnitude_vector": "a DoRA",
    ".diff": "whole layers",
    "lora_controlnet": "a ControlNet",
}
"""Unsupported kinds of adapter, by a part of their tensors' names: they are not, or not only, low-rank terms."""


def fetch_adapter(source: str, *, revision: str | None = None, weight_name: str | None = None) -> Path:
    """Returns an adapter's file. source: its path, its folder's path, or a hub id.

    Raises FileNotFoundError, or ValueError if there are several files or the file is not a LoRA.
    """
    path = Path(source).expanduser()
    if not path.exists():
        if is_path(source):
            raise FileNotFoundError(f"{source} does not exist")
        with asking_hub(source):
            patterns = [weight_name or f"*{WEIGHTS_SUFFIX}"]
            path = Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    file = path if path.is_file() else _choose(path, weight_name)
    _check_kind(file)
    return file


def _choose(folder: Path, weight_name: str | None) -> Path:
    names = sorted(path.name for path in folder.glob(f"*{WEIGHTS_SUFFIX}"))
    if weight_name is not None:
        if weight_name not in names:
            raise FileNotFoundError(f"{folder} has no {weight_name}; it has {', '.join(names) or 'none'}")
        return folder / weight_name
    if USUAL_NAME in names:
        return folder / USUAL_NAME
    if not names:
        raise FileNotFoundError(f"{folder} has no {WEIGHTS_SUFFIX} file: name the folder that has the adapter")
    if len(names) != 1:
        raise ValueError(f"{folder} has {len(names)} weight files ({', '.join(names)}): set weight_name")
    return folder / names[0]


def _check_kind(file: Path) -> None:
    for fault in find_file_faults(file):
        raise ValueError(fault)
    for name in sorted(read_header(file)):
        kinds = [kind for mark, kind in OTHER_KINDS.items() if mark in name]
        if "norm" in name and "lora" not in name:  # diffusers would replace the model's norm by it
            kinds.append("whole layers, as in a ControlLoRA")
        if kinds:
            raise ValueError(f"{name} is part of {kinds[0]}: only LoRA's low-rank terms are served")
