"""Whether one component's weights are whole, by names, sizes and headers: no tensor is read.

Which would be read is decided as diffusers and transformers do: those of the variant, safetensors before pickles.
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
"""Of the names of a library's safetensors, and of its pickles."""
_LFS_HEAD = b"version https://git-lfs"
_MAX_LFS_BYTES = 1024
_MAX_HEADER_BYTES = 100_000_000
"""As the safetensors library has it."""
_LORA = re.compile(r"(^|\.)(lora_(A|B|down|up|embedding_A|embedding_B|magnitude_vector)|base_layer)(\.|$)")
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

Header = Mapping[str, Any]
"""Of a safetensors file: `dtype`, `shape` and `data_offsets` by the tensor's name."""


def find_weights(folder: Path, library: str, variant: str | None) -> Path | None:
    """The file, or the index of the parts, that would be read of a component's folder; None if there is none."""
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
    """Of the file that a component's weights usually are."""
    return f"{_STEMS[library][0]}.safetensors"


def find_variants(folder: Path, library: str) -> list[str]:
    """Of which variants a component has weights; none where it only has plain ones."""
    found = set()
    for stem in set(_STEMS[library]):
        single = re.compile(rf"{stem}\.(?!index\b)([\w-]+?)(?:-\d+-of-\d+)?\.(?:safetensors|bin)")
        index = re.compile(rf"{stem}\.(?:safetensors|bin)(?:\.index\.([\w-]+)|\.(?!index\b)([\w-]+)\.index)\.json")
        for path in folder.glob(f"{stem}.*"):
            match = single.fullmatch(path.name) or index.fullmatch(path.name)
            found |= set() if match is None else {name for name in match.groups() if name}
    return sorted(found)


def find_weight_faults(weights: Path) -> Iterator[str]:
    """One sentence for every file that is not whole. weights: as `find_weights` says."""
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
        yield f"{index} has no weight_map, so it is no index of weights: fetch it again"
        return
    if "metadata" not in content:
        yield f"{index} has no metadata, without which it is not read: fetch it again"
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
                    f"{path} has not got {min(absent)}, which {index.name} says is there ({len(absent)} such): "
                    "the two are not of one checkpoint; fetch both again"
                )
    yield from _find_lora_faults(index, parts)


def find_lora(names: Iterable[str]) -> str | None:
    """The first name of a tensor that belongs to a LoRA layer."""
    return next(filter(_LORA.search, names), None)


def _find_lora_faults(weights: Path, names: Iterable[str]) -> Iterator[str]:
    found = find_lora(names)
    if found is not None:
        yield (
            f"{weights} still has LoRA layers in it ({found}): call diffusers' fuse_lora() and "
            "unload_lora_weights() before save_pretrained()"
        )


def find_file_faults(path: Path) -> list[str]:
    """A sentence if a file is a pointer, a dangling link, empty, cut, not JSON or unreadable; none if whole."""
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
    """Of a safetensors file. Raises ValueError, naming it, if its size is not what its header says."""
    num_bytes = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER_BYTES, num_bytes - 8):
            raise ValueError(f"{path} is no safetensors file, or cut short ({num_bytes:,} bytes): fetch it again")
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
    """What the library says of dtypes, shapes and places. Raises ValueError, naming the file."""
    try:
        with safe_open(path, "numpy"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{path} has a broken safetensors header ({error}): fetch it again") from None


def stored_dtypes(weights: Path) -> set[str]:
    """Of whole safetensors, as config spells them; as safetensors does where config has no word for it."""
    parts = [weights]
    if weights.suffix == ".json":
        parts = [weights.parent / part for part in set(read_json(weights)["weight_map"].values())]
    found = {tensor["dtype"] for part in parts for tensor in read_header(part).values()}
    return {_DTYPES.get(dtype, dtype) for dtype in found}
