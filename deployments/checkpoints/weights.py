"""Checks whether one component's weights are complete, by names, sizes and headers, without reading tensors.

The files are chosen as diffusers and transformers choose them: those of the variant, safetensors before pickles.
"""

import json
import re
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from deployments.checkpoints.json_file import read_json

_STEMS = {
    "diffusers": ("diffusion_pytorch_model", "diffusion_pytorch_model"),
    "transformers": ("model", "pytorch_model"),
}
"""Stems of the names of a library's safetensors files, and of its pickles."""
_LFS_HEAD = b"version https://git-lfs"
_MAX_LFS_BYTES = 1024
_MAX_HEADER_BYTES = 100_000_000
"""Limit of the safetensors library."""
_LORA = re.compile(r"(^|\.)(lora_(A|B|down|up|embedding_A|embedding_B|magnitude_vector)|base_layer)(\.|$)")
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

Header = Mapping[str, Any]
"""Header of a safetensors file: `dtype`, `shape` and `data_offsets` by the tensor's name."""


def find_weights(folder: Path, library: str, variant: str | None) -> Path | None:
    """Returns the file of weights, or the index of the parts, that a component would be loaded from; else None."""
    infix = f".{variant}" if variant else ""
    for stem, ending in zip(_STEMS[library], ("safetensors", "bin"), strict=True):
        names = [f"{stem}{infix}.{ending}", f"{stem}.{ending}.index{infix}.json"]
        if library == "diffusers":
            names = [names[1], f"{stem}.{ending}{infix}.index.json", names[0]]
        for name in names:
            if (folder / name).exists() or (folder / name).is_symlink():
                return folder / name
    return None


def plain_name(library: str) -> str:
    """Returns the usual name of a component's file of weights."""
    return f"{_STEMS[library][0]}.safetensors"


def find_variants(folder: Path, library: str) -> list[str]:
    """Returns the variants that a component has weights of; none if it only has plain weights."""
    found = set()
    for stem in set(_STEMS[library]):
        single = re.compile(rf"{stem}\.(?!index\b)([\w-]+?)(?:-\d+-of-\d+)?\.(?:safetensors|bin)")
        index = re.compile(rf"{stem}\.(?:safetensors|bin)(?:\.index\.([\w-]+)|\.(?!index\b)([\w-]+)\.index)\.json")
        for path in folder.glob(f"{stem}.*"):
            match = single.fullmatch(path.name) or index.fullmatch(path.name)
            found |= set() if match is None else {name for name in match.groups() if name}
    return sorted(found)


def find_weight_faults(weights: Path) -> Iterator[str]:
    """Yields one sentence for every file that is not complete. weights: the result of `find_weights`."""
    faults = find_file_faults(weights)
    yield from faults
    if faults:
        return
    if weights.suffix == ".json":
        yield from _find_part_faults(weights)
    elif weights.suffix == ".safetensors":
        yield from _find_lora_faults(weights, read_header(weights))


def _find_part_faults(index: Path) -> Iterator[str]:
    content = read_json(index)
    parts = content.get("weight_map") if isinstance(content, dict) else None
    if not (isinstance(parts, dict) and parts and all(isinstance(part, str) for part in parts.values())):
        yield f"{index} has no weight_map, so it is not an index of weights: fetch it again"
        return
    if "metadata" not in content:
        yield f"{index} has no metadata and is not read without it: fetch it again"
    for part in sorted(set(parts.values())):
        path = index.parent / part
        if not path.exists() and not path.is_symlink():
            yield f"{path} is missing, and {index.name} names it: fetch it"
            continue
        faults = find_file_faults(path)
        yield from faults
        if not faults and path.suffix == ".safetensors":
            absent = {name for name, home in parts.items() if home == part} - read_header(path).keys()
            if absent:
                yield (
                    f"{path} lacks {min(absent)}, which {index.name} lists ({len(absent)} in all): "
                    "the two are from different checkpoints; fetch both again"
                )
    yield from _find_lora_faults(index, parts)


def find_lora(names: Iterable[str]) -> str | None:
    """Returns the first tensor name that belongs to a LoRA layer, or None."""
    return next(filter(_LORA.search, names), None)


def _find_lora_faults(weights: Path, names: Iterable[str]) -> Iterator[str]:
    found = find_lora(names)
    if found is not None:
        yield (
            f"{weights} still has LoRA layers in it ({found}): call diffusers' fuse_lora() and "
            "unload_lora_weights() before save_pretrained()"
        )


def find_file_faults(path: Path) -> list[str]:
    """Returns a sentence if a file is an LFS pointer, a broken link, empty, cut short, not JSON or unreadable."""
    if path.is_symlink() and not path.exists():
        return [
            f"{path} is a link to {path.readlink()}, which does not exist: was a hub snapshot copied without its "
            "blobs? Copy it with `cp -rL`, or fetch it again"
        ]
    if path.is_dir():
        return [f"{path} is a folder, and must be a file: fetch it again"]
    num_bytes = path.stat().st_size
    if num_bytes == 0:
        return [f"{path} is empty: fetch it again"]
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        return [f"{path} cannot be read: {error.strerror}"]
    if num_bytes < _MAX_LFS_BYTES and head.startswith(_LFS_HEAD):
        return [
            f"{path} is a Git LFS pointer, not the file itself: the repository was cloned without git-lfs; "
            "install git-lfs and run `git lfs pull` there"
        ]
    try:
        if path.suffix == ".json":
            read_json(path)
        elif path.suffix == ".safetensors":
            read_header(path)
            _check_tensors(path)
        elif path.suffix == ".bin" and head.startswith(b"PK") and not zipfile.is_zipfile(path):
            return [f"{path} is cut short ({num_bytes:,} bytes): fetch it again"]
    except ValueError as error:
        return [str(error)]
    return []


def read_header(path: Path) -> Header:
    """Reads the header of a safetensors file. Raises ValueError, naming the file, if its size contradicts it."""
    num_bytes = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER_BYTES, num_bytes - 8):
            raise ValueError(
                f"{path} is not a safetensors file, or is cut short ({num_bytes:,} bytes): fetch it again"
            )
        text = file.read(length)
    try:
        header: dict[str, Any] = json.loads(text)
        header.pop("__metadata__", None)
        end = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} has a broken safetensors header: fetch it again") from None
    if num_bytes != end:
        what = "cut short" if num_bytes < end else "longer than it should be"
        raise ValueError(f"{path} is {what}: it has {num_bytes:,} of {end:,} bytes; fetch it again")
    return header


def _check_tensors(path: Path) -> None:
    """Raises ValueError, naming the file, if the safetensors library finds wrong dtypes, shapes or offsets."""
    try:
        with safe_open(path, "numpy"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{path} has a broken safetensors header ({error}): fetch it again") from None


def stored_dtypes(weights: Path) -> set[str]:
    """Returns the dtypes in complete safetensors files, by config's names; others by safetensors' names."""
    parts = [weights]
    if weights.suffix == ".json":
        parts = [weights.parent / part for part in set(read_json(weights)["weight_map"].values())]
    found = {tensor["dtype"] for part in parts for tensor in read_header(part).values()}
    return {_DTYPES.get(dtype, dtype) for dtype in found}
