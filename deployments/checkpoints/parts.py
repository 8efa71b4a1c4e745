"""Components whose weights lie in files of their own: a whole model in one file, or a denoiser beside a folder.

All other code reads folders in diffusers' layout, so such a folder of links is made in the user's cache. Configs,
tokenizers and all components that are in no file are taken from the configured layout. Components in a safetensors
file are converted once per dtype (`convert`, in a process of its own). GGUF files are linked unchanged and read
when the model is loaded.
"""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock

from deployments.checkpoints.layout import describe_pickle
from deployments.checkpoints.source import fetch_checkpoint, fetch_file
from deployments.checkpoints.together import CACHE, put_together
from deployments.checkpoints.weights import find_file_faults, find_lora, read_header
from deployments.config.model import ModelConfig
from deployments.config.stage import StageConfig
from deployments.memory.config import GGUF_WEIGHTS, Dtype, QuantizationConfig
from deployments.memory.conflicts import find_conflict

log = logging.getLogger("ray.serve")

ModelIndex = Mapping[str, Any]
CONVERT = "deployments.checkpoints.convert"
GGUF = ".gguf"
_GGUF_HEAD = b"GGUF"
_PREFIXES = {
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0.transformer.", "text_encoders.clip_l."),
    "text_encoder_2": (
        "conditioner.embedders.0.model.",
        "conditioner.embedders.1.",
        "text_encoders.clip_g.",
    ),
    "vae": ("first_stage_model.", "vae."),
    "audio_vae": ("audio_vae.",),
}
"""Prefixes of a component's tensor names in files of whole models. All other tensors are the denoiser's."""
_T5_PREFIX = "text_encoders.t5xxl."
_DENOISERS = ("transformer", "unet")
"""Denoisers that a file of a whole model can hold. A second denoiser, as in Wan 2.2, has a file of its own."""


def find_parts(model: ModelConfig, index: ModelIndex) -> dict[str, Path]:
    """Returns the file of each component that is in one, by name. Raises ValueError or FileNotFoundError."""
    parts: dict[str, Path] = {}
    if model.config is not None:
        whole = fetch_file(model.checkpoint, "model.config is for a checkpoint in one file")
        _check(whole)
        names = () if whole.suffix == GGUF else read_header(whole)
        parts = {name: whole for name in index if _is_model(index, name) and _holds(names, name, index[name][1])}
    for name, file in model.components.items():
        if not _is_model(index, name):
            known = ", ".join(sorted(other for other in index if _is_model(index, other)))
            raise ValueError(f"model.components: {model.layout} has no model {name!r}; it has {known}")
        parts[name] = fetch_file(file, f"model.components.{name} must be a file of weights")
        _check(parts[name])
    return parts


def find_part_faults(name: str, file: Path, entry: Sequence[str], config: StageConfig) -> Iterator[str]:
    """Yields what would keep a component's complete file from being read with this config."""
    library, class_name = entry
    if file.suffix != GGUF:
        return
    if library != "diffusers" or name.startswith("vae"):
        yield f"{file}: GGUF files are only read for denoisers, and {name} has class {class_name}"
    for option in ("quantization", "device_map"):
        if getattr(config, option, None) is not None:
            yield f"{file} is quantised (GGUF), which does not combine with {option}: leave out {option}"
            return
    stored = config.model_copy(update={"quantization": QuantizationConfig()})
    conflict = find_conflict(stored)
    if conflict is not None:
        yield f"{file} is stored quantised, and {conflict}"


def open_checkpoint(model: ModelConfig, index: ModelIndex, components: Collection[str], dtype: Dtype) -> Path:
    """Returns a folder with `components`, and every model's config.

    Raises ValueError, or the errors of `fetch_checkpoint`.
    """
    parts = {name: file for name, file in find_parts(model, index).items() if name in components}
    others = frozenset(components) - parts.keys()
    layout = fetch_checkpoint(model.layout, others, revision=model.revision, variant=model.variant)
    if not parts:
        return layout
    held = {name: _open_part(file, layout, name, index[name][1], dtype) for name, file in parts.items()}
    return put_together({entry.name: entry for entry in layout.iterdir()} | held)


def _check(file: Path) -> None:
    """Raises ValueError if the file is not a complete GGUF or safetensors file, or is a LoRA."""
    if file.suffix not in (GGUF, ".safetensors"):
        raise ValueError(describe_pickle(file))
    for fault in find_file_faults(file):
        raise ValueError(fault)
    with file.open("rb") as opened:
        head = opened.read(len(_GGUF_HEAD))
    if file.suffix == GGUF and head != _GGUF_HEAD:
        raise ValueError(f"{file} is not a GGUF file, or is cut short: fetch it again")
    if file.suffix == ".safetensors" and find_lora(read_header(file)) is not None:
        raise ValueError(f"{file} is a LoRA, not a model")


def _is_model(index: ModelIndex, name: str) -> bool:
    """Whether a component is a model, judged by its class name, because configs need not have been fetched."""
    entry = index.get(name)
    if not (isinstance(entry, list) and len(entry) == 2 and entry[0] in ("diffusers", "transformers")):
        return False
    others = ("Scheduler", "Guidance", "Tokenizer", "TokenizerFast", "Processor", "Extractor")
    return not str(entry[1]).endswith(others)


def _holds(tensors: Iterable[str], name: str, class_name: str) -> bool:
    prefixes = (_T5_PREFIX,) if class_name == "T5EncoderModel" else _PREFIXES.get(name)
    if prefixes is None:
        return name in _DENOISERS
    return any(tensor.startswith(prefixes) for tensor in tensors)


def _open_part(file: Path, layout: Path, name: str, class_name: str, dtype: Dtype) -> Path:
    """Returns the component's folder, which it makes if need be.

    Safe for concurrent processes: the folder is renamed into place, so one that exists is complete.
    """
    is_gguf = file.suffix == GGUF
    config = layout / name / "config.json"
    told = file.stat()
    key = [str(file.resolve()), told.st_mtime_ns, told.st_size, class_name, is_gguf or dtype, config.read_text()]
    digest = hashlib.sha256(json.dumps([*key, version("diffusers")]).encode()).hexdigest()[:16]
    folder = Path.home() / CACHE / f"{file.stem}-{name}-{digest}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not folder.is_dir():  # another process may have made it while we waited
            with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as building:
                made = Path(building) / folder.name
                (_link_gguf if is_gguf else _convert)(file, layout, name, made, dtype)
                made.rename(folder)
    return folder


def _convert(file: Path, layout: Path, name: str, folder: Path, dtype: Dtype) -> None:
    """Converts a component in a child process. Raises ValueError with the reason if that fails."""
    log.warning("%s: converting its %s to %s, once; the result is kept in ~/%s", file, name, dtype, CACHE)
    command = [sys.executable, "-m", CONVERT, str(file), str(layout), name, str(folder), dtype]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if ran.returncode:
        reason = (ran.stderr.strip() or "no reason given").splitlines()[-1]
        raise ValueError(f"{file}: its {name} cannot be converted with the configs of {layout}: {reason}")


def _link_gguf(file: Path, layout: Path, name: str, folder: Path, _dtype: Dtype) -> None:
    folder.mkdir()
    shutil.copyfile(layout / name / "config.json", folder / "config.json")
    (folder / GGUF_WEIGHTS).symlink_to(file.resolve())
