"""Where an adapter's weights are, and whether they are a LoRA's. Torch-free."""

from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import snapshot_download

from deployments.adapter import WEIGHTS_SUFFIX
from deployments.checkpoints.source import asking_hub
from deployments.checkpoints.weights import find_file_faults, read_header

USUAL_NAME = "pytorch_lora_weights.safetensors"
"""diffusers'."""
OTHER_KINDS: Mapping[str, str] = {
    "lokr_": "a LoKr",
    "hada_": "a LoHa",
    "oft_": "an OFT",
    "dora_scale": "a DoRA",
    "lora_magnitude_vector": "a DoRA",
    ".diff": "whole layers",
    "lora_controlnet": "a ControlNet's",
}
"""By what is in their tensors' names: they are more than a low-rank term, or another one."""


def fetch_adapter(source: str, *, revision: str | None = None, weight_name: str | None = None) -> Path:
    """The file of an adapter, by its path, in a folder, or of a hub id.

    Raises FileNotFoundError, or ValueError where it is not one file, or no LoRA's.
    """
    path = Path(source).expanduser()
    if not path.exists():
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
    if len(names) != 1:
        raise ValueError(f"{folder} has {len(names)} files of weights ({', '.join(names)}): say weight_name")
    return folder / names[0]


def _check_kind(file: Path) -> None:
    for fault in find_file_faults(file):
        raise ValueError(fault)
    for name in sorted(read_header(file)):
        for mark, kind in OTHER_KINDS.items():
            if mark in name:
                raise ValueError(f"{name} is of {kind}: only LoRA's low-rank terms are served")
