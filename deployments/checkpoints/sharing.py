"""Checks whether two checkpoints have the same models for a stage, so that one process can hold them for both."""

import hashlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from deployments.checkpoints.components import DECODERS, ModelIndex, Stage, fetch_stage, stage_components
from deployments.checkpoints.json_file import read_json
from deployments.checkpoints.packages import library_of
from deployments.checkpoints.weights import find_weights
from deployments.config.model import ModelConfig
from deployments.memory.config import Dtype

_ENCODERS = ("text_encoder", "image_encoder", "connectors")
"""How the names of encoders begin."""
_HUB_BLOB = re.compile(r"[0-9a-f]{64}")
"""Name of a weight file in the hub's cache: its SHA-256."""
_NO_MATTER = re.compile(r"_.*|dtype|torch_dtype|transformers_version")
"""Keys of a config that are ignored: they say where it comes from, or how it was saved."""


class NotTheSame(ValueError):
    """Two checkpoints cannot share the stage. The message says what differs."""


def held_names(index: ModelIndex, model: ModelConfig, stage: Stage) -> frozenset[str]:
    """Returns the stage's components with weights; models that share the stage must have them in common."""
    names = stage_components(index, model.architecture, stage)
    return frozenset(name for name in names if name.startswith(_ENCODERS) or name in DECODERS)


def check_same(owner: ModelConfig, other: ModelConfig, stage: Stage, dtype: Dtype) -> None:
    """Raises NotTheSame if two checkpoints' components for the stage differ, or the errors of `fetch_stage`.

    Reads configs and file sizes, and whole files if those are equal and the paths do not name the same file.
    """
    folder, index = fetch_stage(owner, stage, dtype)
    other_folder, other_index = fetch_stage(other, stage, dtype)
    here, there = held_names(index, owner, stage), held_names(other_index, other, stage)
    if here != there:
        raise NotTheSame(f"{owner.name!r} has {_listed(here)} in it, and {other.name!r} has {_listed(there)}")
    for name in sorted(here):
        entries = list(index[name]), list(other_index[name])
        found = [f"class {entries[0][1]}, {entries[1][1]}"] if entries[0] != entries[1] else []
        found += _differences(folder / name, other_folder / name, entries[0][0], (owner.variant, other.variant))
        if found:
            raise NotTheSame(f"{name} of {owner.name!r} and of {other.name!r} differ in {found[0]}")


def _listed(names: frozenset[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"


def _differences(
    folder: Path, other: Path, library: str, variants: tuple[str | None, str | None]
) -> Iterator[str]:
    """Yields descriptions of differences between two components: configs first, then weight files."""
    settings, others = (_settings(each / "config.json") for each in (folder, other))
    for key in sorted(settings.keys() | others.keys()):
        if settings.get(key) != others.get(key):
            yield f"config.json, {key}: {settings.get(key)!r}, {others.get(key)!r}"
    files = [
        _files(each, find_weights(each, library_of(library), variant))
        for each, variant in zip((folder, other), variants, strict=True)
    ]
    if len(files[0]) != len(files[1]):
        yield f"the number of their weight files: {len(files[0])}, {len(files[1])}"
    if not files[0]:
        yield "their weights: no weight files were found"
    for one, two in zip(*files, strict=False):
        if not _is_same(one, two):
            yield f"their weights: {one}, {two}"


def _settings(file: Path) -> dict[str, Any]:
    content = read_json(file) if file.is_file() else {}
    return {key: value for key, value in content.items() if not _NO_MATTER.fullmatch(key)}


def _files(folder: Path, weights: Path | None) -> list[Path]:
    """Returns a component's weight files. weights: the file, or the index of several; None: the folder may hold
    GGUF files."""
    if weights is None:
        return sorted(folder.glob("*.gguf"))
    if weights.suffix != ".json":
        return [weights]
    return [weights.parent / part for part in sorted(set(read_json(weights)["weight_map"].values()))]


def _is_same(one: Path, two: Path) -> bool:
    if one.samefile(two):
        return True
    return one.stat().st_size == two.stat().st_size and _digest(one.resolve()) == _digest(two.resolve())


@cache
def _digest(file: Path) -> str:
    if _HUB_BLOB.fullmatch(file.name) and file.parent.name == "blobs":
        return file.name
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
