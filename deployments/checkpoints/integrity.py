"""Finds faults in a checkpoint's files that would keep a stage from loading, and describes each in one sentence.

Reads only headers and small files, and only of files that the stage needs. Imports no torch.
"""

import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from deployments.checkpoints.components import (
    SEE_PICTURES,
    ModelIndex,
    Stage,
    component_names,
    denoiser_names,
    read_index,
    stage_components,
)
from deployments.checkpoints.json_file import read_json, read_settings
from deployments.checkpoints.packages import describe_missing, is_public, library_of
from deployments.checkpoints.parts import find_part_faults, find_parts
from deployments.checkpoints.source import fetch_checkpoint, fetch_configs
from deployments.checkpoints.weights import (
    find_file_faults,
    find_variants,
    find_weight_faults,
    find_weights,
    plain_name,
    stored_dtypes,
)
from deployments.config.model import ModelConfig
from deployments.config.stage import StageConfig
from deployments.config.transformer import TransformerConfig
from deployments.families.parallel import find_parallel_faults

LIBRARIES = ("diffusers", "transformers")
_PROCESSOR_CONFIGS = ("processor_config.json", "preprocessor_config.json")
_SENTENCEPIECE = ("spiece.model", "tokenizer.model", "sentencepiece.bpe.model")
_OTHER_WEIGHTS = {".safetensors", ".bin", ".gguf", ".pt", ".pth", ".ckpt", ".msgpack", ".onnx", ".h5"}
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", *_SENTENCEPIECE)


class BrokenCheckpoint(ValueError):
    """A checkpoint's files cannot be loaded. The message has one line per fault."""


def check_stage(model: ModelConfig, stage: Stage, config: StageConfig) -> None:
    """Fetches what the stage needs and checks it. Raises BrokenCheckpoint, or the errors of `fetch_checkpoint`."""
    faults = [*find_offload_faults(stage, config), *find_stage_faults(model, stage, config)]
    if faults:
        raise BrokenCheckpoint("\n".join(faults))


def find_stage_faults(model: ModelConfig, stage: Stage, config: StageConfig) -> Iterator[str]:
    """Yields the faults of the checkpoint's files. Raises the errors of `fetch_checkpoint`."""
    index = read_index(fetch_configs(model.layout, revision=model.revision))
    components, parts = stage_components(index, model.architecture, stage), find_parts(model, index)
    others = components - parts.keys()
    folder = fetch_checkpoint(model.layout, others, revision=model.revision, variant=model.variant)
    variant_faults = list(_find_variant_faults(model, folder, index))
    yield from variant_faults
    for name in sorted(components) if not variant_faults else ():
        entry = index.get(name)
        if isinstance(entry, list) and len(entry) == 2:
            variants = _variants_of(name, index, model)
            yield from _find_component_faults(folder / name, entry, variants, config, parts.get(name))
        else:
            yield f"{folder / 'model_index.json'} does not say which class {name} has: fetch it again"


def find_offload_faults(stage: Stage, config: StageConfig) -> Iterator[str]:
    """Yields the faults of the folder that offloaded weights are written to."""
    folder = None if config.offload is None or config.offload.folder is None else Path(config.offload.folder)
    if folder is None:
        return
    name = {"encode": "encoder", "denoise": "transformer", "decode": "vae"}[stage]
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        yield f"{name}.offload.folder: {folder} {what}: make the folder, or leave it out"
    elif not os.access(folder, os.W_OK | os.X_OK):
        yield f"{name}.offload.folder: the folder {folder} is not writable: fix its permissions"


def _find_variant_faults(model: ModelConfig, folder: Path, index: ModelIndex) -> Iterator[str]:
    """Yields a fault if no component has the variant. diffusers takes plain weights where only some lack it."""
    if model.variant is None or model.config is not None:
        return
    found: set[str] = set()
    for name in component_names(index):
        if index[name][0] in LIBRARIES and (folder / name).is_dir():
            found |= set(find_variants(folder / name, index[name][0]))
    if model.variant not in found:
        yield (
            f"model.variant: {folder} has no weights of the variant {model.variant!r}; it has "
            f"{', '.join(sorted(found)) or 'none'}: leave out variant{' or choose one of these' if found else ''}"
        )


def _variants_of(name: str, index: ModelIndex, model: ModelConfig) -> tuple[str | None, ...]:
    """Returns the variants of a component's weights that may be loaded: as in diffusers plain ones too, but not
    for denoisers."""
    return (model.variant,) if name in denoiser_names(index) else (model.variant, None)


def _find_component_faults(
    folder: Path, entry: Sequence[str], variants: Sequence[str | None], config: StageConfig, part: Path | None
) -> Iterator[str]:
    """Yields the faults of one component. part: the file with its weights, if they are not in its folder."""
    package, class_name = entry
    library = library_of(package)
    if not folder.is_dir() or not any(folder.iterdir()):
        yield f"{folder} is empty: fetch the checkpoint again"
        return
    if library not in LIBRARIES:
        yield f"{folder}: its class {class_name} is from {library}; only diffusers' and transformers' are loaded"
        return
    yield from _find_class_faults(folder, package, class_name)
    if folder.name.startswith("tokenizer"):
        yield from _find_tokenizer_faults(folder)
    elif folder.name in SEE_PICTURES - {"image_encoder"}:
        files = [folder / name for name in _PROCESSOR_CONFIGS]
        yield from () if any(file.exists() for file in files) else (f"{folder} has no {files[0].name}: fetch it",)
    elif folder.name == "scheduler":
        yield from _find_config_faults(folder / "scheduler_config.json")
    elif folder.name.endswith("guider"):
        yield from _find_config_faults(folder / "guider_config.json")
    else:
        faults = list(_find_config_faults(folder / "config.json"))
        yield from faults
        if not faults:
            stored = read_json(folder / "config.json")
            yield from _find_quantization_faults(folder, stored, config)
            yield from _find_cut_faults(stored, config)
            yield from _find_sharing_faults(class_name, stored, config)
        if part is None:
            yield from _find_model_faults(folder, library, class_name, variants, config)
        else:
            yield from find_part_faults(folder.name, part, entry, config)


def _find_config_faults(path: Path) -> list[str]:
    if not path.exists() and not path.is_symlink():
        return [f"{path} is missing: fetch it"]
    faults = find_file_faults(path)
    if not faults:
        try:
            read_settings(path)
        except ValueError as error:
            return [str(error)]
    return faults


def _find_class_faults(folder: Path, package: str, class_name: str) -> Iterator[str]:
    """Yields a fault if the installed diffusers lacks the class or a package that it needs.

    transformers' classes are not checked: no file lists them all, and loading a missing one gives a clear error.
    """
    if library_of(package) != "diffusers":
        return
    if not is_public(class_name, package):
        yield (
            f"{folder}: diffusers {version('diffusers')} has no class {class_name}: install a newer diffusers, or "
            "correct model_index.json"
        )
    elif missing := describe_missing(class_name):
        yield f"{folder}: {missing}"


def _find_cut_faults(stored: Mapping[str, Any], config: StageConfig) -> Iterator[str]:
    """Yields a fault if there are more shards than blocks. The exact cuts are only known once a model is built
    (engine/blocks.py)."""
    if not isinstance(config, TransformerConfig) or config.num_shards == 1:
        return
    if "down_block_types" in stored:
        num_blocks = len(stored["down_block_types"]) + 1 + len(stored.get("up_block_types", ()))
    elif "num_layers" in stored:
        num_blocks = stored["num_layers"] + stored.get("num_single_layers", 0)
    else:
        return
    if config.cuts is not None and config.cuts[-1] >= num_blocks:
        yield f"transformer.cuts: must be below {num_blocks}, the number of blocks, got {config.cuts[-1]}"
    elif config.num_shards > num_blocks:
        yield (
            f"transformer.shards: must be at most {num_blocks}, because each needs a block, got "
            f"{config.num_shards}"
        )


def _find_sharing_faults(class_name: str, stored: Mapping[str, Any], config: StageConfig) -> Iterator[str]:
    if isinstance(config, TransformerConfig):
        yield from find_parallel_faults(class_name, stored, config.context_parallel, config.tensor_parallel)


def _find_quantization_faults(folder: Path, own: Mapping[str, Any], config: StageConfig) -> Iterator[str]:
    stored = own.get("quantization_config")
    if stored is None:
        return
    if not isinstance(stored, Mapping):
        yield f"{folder / 'config.json'}: quantization_config must be a JSON object: fetch the file again"
        return
    method = str(stored.get("quant_method") or "")
    is_bitsandbytes = stored.get("load_in_4bit") or stored.get("load_in_8bit")
    if method.startswith("bitsandbytes") or (method == "" and is_bitsandbytes):
        return
    if method != "torchao":
        yield (
            f"{folder} is stored quantised by {method or 'a method that its config.json does not name'}, which is "
            "not supported: only bitsandbytes (nf4, fp4, int8) and torchao are. Use the unquantised "
            f"{folder.name}, and set `quantization:` to make it small"
        )
    elif importlib.util.find_spec(method) is None:
        yield f"{folder} is stored quantised by torchao, which is not installed here: `pip install torchao`"
    elif config.quantization is not None:
        yield f"{folder} is stored quantised by torchao already: leave out quantization"


def _reads_bytes(folder: Path) -> bool:
    """Whether the tokenizer is a ByT5Tokenizer, which has no vocabulary, as HunyuanImage's for glyphs."""
    file = folder / "tokenizer_config.json"
    return file.is_file() and read_json(file).get("tokenizer_class") == "ByT5Tokenizer"


def _find_tokenizer_faults(folder: Path) -> Iterator[str]:
    names = {path.name for path in folder.iterdir() if not path.is_dir()}
    has_whole = "tokenizer.json" in names
    for name in sorted(names):
        if not (has_whole and name in _SENTENCEPIECE):
            yield from find_file_faults(folder / name)
    if has_whole or _reads_bytes(folder):
        return
    found = [name for name in _VOCABULARIES if name in names]
    if not found:
        yield f"{folder} has no vocabulary ({', '.join(_VOCABULARIES)}): fetch it again"
    elif found == ["vocab.json"] and "merges.txt" not in names:
        yield f"{folder / 'merges.txt'} is missing, and vocab.json cannot be used without it: fetch it"
    elif found[0] in _SENTENCEPIECE and importlib.util.find_spec("sentencepiece") is None:
        yield (
            f"{folder} has {found[0]} but no tokenizer.json, and reading {found[0]} needs sentencepiece, which is "
            "not installed: `pip install sentencepiece`"
        )


def _find_model_faults(
    folder: Path, library: str, class_name: str, variants: Sequence[str | None], config: StageConfig
) -> Iterator[str]:
    found = (find_weights(folder, library, variant) for variant in variants)
    weights = next((file for file in found if file is not None), None)
    if weights is None:
        yield _no_weights(folder, library, variants[0])
        return
    faults = list(find_weight_faults(weights))
    yield from faults
    is_pickled = ".bin" in weights.name
    if is_pickled and weights.suffix == ".json" and library == "diffusers":
        yield (
            f"{weights} is an index of pickled weights in parts, which diffusers does not find: convert them to "
            f"safetensors with `python -c \"import diffusers; diffusers.{class_name}.from_pretrained('{folder}', "
            f"use_safetensors=False).save_pretrained('{folder}')\"`"
        )
    if config.host_copy == "files" and not faults:
        yield from _find_mapping_faults(weights, is_pickled, config)


def _find_mapping_faults(weights: Path, is_pickled: bool, config: StageConfig) -> Iterator[str]:
    if is_pickled:
        yield f"{weights} is pickled, and host_copy: files needs safetensors: convert it, or leave out host_copy"
        return
    dtypes = stored_dtypes(weights)
    if config.dtype not in dtypes:
        stored = ", ".join(sorted(dtypes))
        yield (
            f"{weights} is stored as {stored}, but dtype is {config.dtype}, and host_copy: files needs the files' "
            "dtype: set dtype to that, or leave out host_copy"
        )


def _no_weights(folder: Path, library: str, variant: str | None) -> str:
    variants = find_variants(folder, library)
    wanted = "plain weights" if variant is None else f"weights of the variant {variant!r}"
    if variants:
        return (
            f"{folder} has no {wanted}, only those of the variant {' and '.join(variants)}: set "
            f"`variant: {variants[0]}` under model"
        )
    if variant is not None and find_weights(folder, library, None) is not None:
        return f"{folder} has no {wanted}, only plain ones: leave out variant"
    others = ", ".join(sorted(path.name for path in folder.iterdir() if path.suffix in _OTHER_WEIGHTS))
    seen = f"; it has {others}, whose name or format {library} does not read" if others else ""
    return f"{folder} has no weights ({plain_name(library)}){seen}: fetch them"
