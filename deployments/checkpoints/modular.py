"""Converts checkpoints of diffusers' modular pipelines to the usual layout; they have a modular_model_index.json.

Such an index says for each component where it lies: in this repository, in another, or in a folder. The components
that are on this machine are linked into one folder, with a model_index.json like that of other pipelines.
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
"""Key of an index that only modular pipelines have: the class of the pipeline's blocks."""
_OWN_CODE = "modular_config.json"
_LOCATION = "pretrained_model_name_or_path"
_AUTO = {"AutoProcessor": "processor_class", "AutoTokenizer": "tokenizer_class"}
"""transformers' auto classes, and the key of a component's own files that names its real class."""
_SETTINGS = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


def is_modular(index: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's index is that of a modular pipeline."""
    return BLOCKS in index


def open_modular(folder: Path, repository: str | None = None) -> Path:
    """Returns the folder itself, or, if it has only a modular_model_index.json, a folder of links in usual layout.

    repository: hub id of the folder, if components of it may not have been fetched yet.

    Raises ValueError if the index does not name the blocks' class, or the blocks are code of the checkpoint's own.
    """
    file = folder / MODULAR_INDEX
    if (folder / MODEL_INDEX).exists() or not file.is_file():
        return folder
    if (folder / _OWN_CODE).is_file() and "auto_map" in read_settings(folder / _OWN_CODE):
        raise ValueError(
            f"{folder} brings its own code for its blocks, and a checkpoint's code is never run: only blocks "
            f"that diffusers has can be served. Remove {_OWN_CODE} if diffusers' blocks are enough"
        )
    told = read_settings(file)
    if not told.get(BLOCKS):
        raise ValueError(f"{file} does not say which class its blocks have ({BLOCKS}): fetch it again")
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
    """Returns where each component lies according to the index, by component name."""
    return dict(_locations(read_settings(folder / MODULAR_INDEX)))


def _locations(told: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, entry in told.items():
        if _is_component(name, entry):
            parts = (entry[2].get(_LOCATION), entry[2].get("subfolder"))
            yield name, "/".join(part for part in parts if part)


def _is_component(name: str, entry: Any) -> bool:
    """Whether an entry of the index is a component. Its name becomes a file name, so it must be an identifier."""
    return name.isidentifier() and isinstance(entry, list) and len(entry) == 3 and isinstance(entry[2], dict)


def _find(folder: Path, name: str, where: Mapping[str, Any]) -> Path | None:
    """Returns a component's folder, or None. The checkpoint's own folder comes first, as in diffusers: a copy of a
    repository keeps the original's index."""
    subfolder = where.get("subfolder") or name
    elsewhere = Path(where.get(_LOCATION) or folder).expanduser() / (where.get("subfolder") or "")
    candidates = (folder / subfolder, folder / name, elsewhere)
    return next((path for path in candidates if path.is_dir() and path.resolve() != folder.resolve()), None)


def _class_of(entry: list[Any], found: Path | None) -> list[Any]:
    """Returns [library, class]; from the type hint if the index was saved without the component."""
    library, class_name = entry[:2] if entry[0] else entry[2].get("type_hint") or (None, None)
    if class_name in _AUTO and found is not None:
        files = (found / name for name in _SETTINGS)
        named = (read_settings(file).get(_AUTO[class_name]) for file in files if file.is_file())
        class_name = next(filter(None, named), class_name)
    return [library, class_name]
