"""Checkpoints of pipelines that diffusers has as blocks: modular_model_index.json, in the layout of all others.

Such an index says of each component where it lies: in this repository, in another, in a folder. What is on this
machine is put together in a folder of links, with a model_index.json that says the same as of any pipeline.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from deployments.checkpoints.json_file import read_settings
from deployments.checkpoints.together import put_together

MODEL_INDEX = "model_index.json"
MODULAR_INDEX = "modular_model_index.json"
BLOCKS = "_blocks_class_name"
"""In an index, whose pipeline is modular if it has it: the class of all its blocks."""
_OWN_CODE = "modular_config.json"
_LOCATION = "pretrained_model_name_or_path"
_AUTO = {"AutoProcessor": "processor_class", "AutoTokenizer": "tokenizer_class"}
"""Classes that stand for the one that a component's own files name, and where those name it."""
_SETTINGS = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


def is_modular(index: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's index is of a pipeline made of blocks."""
    return BLOCKS in index


def open_modular(folder: Path, repository: str | None = None) -> Path:
    """The folder as it is, or, where it has a modular_model_index.json alone, in the layout of all others.

    repository: of the hub, from which not everything may have been fetched yet.

    Raises ValueError if that is none, or its blocks are code of its own.
    """
    file = folder / MODULAR_INDEX
    if (folder / MODEL_INDEX).exists() or not file.is_file():
        return folder
    if (folder / _OWN_CODE).is_file() and "auto_map" in read_settings(folder / _OWN_CODE):
        raise ValueError(
            f"{folder} brings blocks of its own, which are code, and no checkpoint's code is run here: only "
            f"blocks that diffusers has can be served. Take {_OWN_CODE} away if those will do"
        )
    told = read_settings(file)
    if not told.get(BLOCKS):
        raise ValueError(f"{file} does not say of which class its blocks are ({BLOCKS}): fetch it again")
    links = {entry.name: entry for entry in folder.iterdir()}
    index = dict(told)
    for name, entry in told.items():
        if _is_component(name, entry):
            found = _find(folder, name, entry[2])
            is_there = found is not None or (repository is not None and entry[2].get(_LOCATION) == repository)
            index[name] = _class_of(entry, found) if is_there else [None, None]
            links |= {} if found is None else {name: found}
    return put_together(links, {MODEL_INDEX: json.dumps(index, indent=2)})


def locations(folder: Path) -> Mapping[str, str]:
    """By the name of each component: where its index says that it is."""
    return dict(_locations(read_settings(folder / MODULAR_INDEX)))


def _locations(told: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, entry in told.items():
        if _is_component(name, entry):
            parts = (entry[2].get(_LOCATION), entry[2].get("subfolder"))
            yield name, "/".join(part for part in parts if part)


def _is_component(name: str, entry: Any) -> bool:
    """Its name becomes a file's, which is to lie where it is made."""
    return name.isidentifier() and isinstance(entry, list) and len(entry) == 3 and isinstance(entry[2], dict)


def _find(folder: Path, name: str, where: Mapping[str, Any]) -> Path | None:
    """First in the checkpoint's own folder, as diffusers does: a copy of a repository keeps the original index."""
    subfolder = where.get("subfolder") or name
    elsewhere = Path(where.get(_LOCATION) or folder).expanduser() / (where.get("subfolder") or "")
    candidates = (folder / subfolder, folder / name, elsewhere)
    return next((path for path in candidates if path.is_dir() and path.resolve() != folder.resolve()), None)


def _class_of(entry: list[Any], found: Path | None) -> list[Any]:
    """Library and class; those of the type where the index was saved without the component."""
    library, class_name = entry[:2] if entry[0] else entry[2].get("type_hint") or (None, None)
    if class_name in _AUTO and found is not None:
        files = (found / name for name in _SETTINGS)
        named = (read_settings(file).get(_AUTO[class_name]) for file in files if file.is_file())
        class_name = next(filter(None, named), class_name)
    return [library, class_name]
