"""Handles paths that are no checkpoint in diffusers' layout: finds the checkpoint meant, or explains the path."""

from collections.abc import Callable
from pathlib import Path

from deployments.checkpoints.modular import MODEL_INDEX, MODULAR_INDEX
from deployments.checkpoints.weights import find_lora, read_header

_INDEXES = (MODEL_INDEX, MODULAR_INDEX)
_PICKLES = {".ckpt", ".pt", ".pth", ".bin"}
_WEIGHTS = {".safetensors", ".gguf", *_PICKLES}
_LAYOUTS = {
    "joint_blocks.": "stabilityai/stable-diffusion-3-medium-diffusers",
    "double_blocks.": "black-forest-labs/FLUX.1-dev",
    "conditioner.embedders.": "stabilityai/stable-diffusion-xl-base-1.0",
    "cond_stage_model.": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "patch_embedding.": "Wan-AI/Wan2.1-T2V-14B-Diffusers",
}
"""Hub ids in diffusers' layout, by a part of the tensor names in a matching single file."""


def open_hub_cache(folder: Path, revision: str | None) -> Path:
    """Returns the snapshot in a folder of the hub's cache (`models--OWNER--NAME`); any other folder unchanged.

    Raises FileNotFoundError if the cache has no such snapshot.
    """
    snapshots = folder / "snapshots"
    if (folder / MODEL_INDEX).exists() or not snapshots.is_dir():
        return folder
    commits = sorted(path.name for path in snapshots.iterdir() if path.is_dir())
    ref = folder / "refs" / (revision or "main")
    commit = ref.read_text().strip() if ref.is_file() else revision
    if commit is None and len(commits) == 1:
        commit = commits[0]
    if commit not in commits:
        raise FileNotFoundError(
            f"{folder} is a folder of the hub's cache without a snapshot of {revision or 'main'}; it has "
            f"{', '.join(commits) or 'none'}: set `revision` under model to one of them, or fetch it again"
        )
    return snapshots / str(commit)


def describe_other_layout(path: Path) -> str:
    """Returns a sentence on what a path without model_index.json is, and how to get a checkpoint from it."""
    layouts = _FILES if path.is_file() else _FOLDERS
    return next(tell(path) for is_it, tell in layouts if is_it(path))


def _has(*patterns: str) -> Callable[[Path], bool]:
    return lambda folder: any(any(folder.glob(pattern)) for pattern in patterns)


def describe_pickle(file: Path) -> str:
    """Returns a sentence on a file of weights that is neither safetensors nor GGUF."""
    code = (
        f"import torch, safetensors.torch as s; w = torch.load('{file}', weights_only=True); "
        f"s.save_file(w.get('state_dict', w), '{file.with_suffix('.safetensors')}')"
    )
    return (
        f"{file} is pickled, or holds no weights. Pickles are not read, because a pickle can run any program: "
        f'convert it with `python -c "{code}"`, and name the new file'
    )


def _tell_single(file: Path) -> str:
    """Returns a sentence on a single file of weights. It suggests a layout if the tensor names can be read."""
    try:
        names = "\n".join(read_header(file))
    except (OSError, ValueError):
        names = ""
    like = next((layout for mark, layout in _LAYOUTS.items() if mark in names), "OWNER/NAME")
    return (
        f"{file} is a single file of weights. If it holds a whole model, set `config` under model to the folder "
        f"or hub id in diffusers' layout with its configs and tokenizers, such as `config: {like}`; if it holds a "
        f"denoiser alone, serve `checkpoint: {like}` with `components: {{transformer: {file}}}`"
    )


def _is_lora(file: Path) -> bool:
    try:
        return file.suffix == ".safetensors" and find_lora(read_header(file)) is not None
    except (OSError, ValueError):
        return False


def _tell_lora(path: Path) -> str:
    return (
        f"{path} is a LoRA, not a checkpoint. Serve its base model with `adapters: {{NAME: {{source: {path}}}}}`; "
        "or fuse it into that model: load the model with diffusers' "
        f"DiffusionPipeline.from_pretrained, then load_lora_weights('{path}'), fuse_lora(), unload_lora_weights() "
        "and save_pretrained('NEW_FOLDER'), and serve NEW_FOLDER"
    )


def _tell_weights(folder: Path) -> str:
    file = next(file for file in sorted(folder.iterdir()) if file.suffix in _WEIGHTS)
    told = describe_pickle(file) if file.suffix in _PICKLES else _tell_single(file)
    return (
        f"{folder} holds weight files but no {MODEL_INDEX}, so it is not in diffusers' layout. Fetch the "
        f"whole repository, or name one file: {told}"
    )


Layouts = tuple[tuple[Callable[[Path], bool], Callable[[Path], str]], ...]
"""Pairs of a test and a description; the first test that is true for a path gives its description."""

_FILES: Layouts = (
    (lambda file: file.name in _INDEXES, lambda file: f"{file} is a file of a checkpoint: name its folder"),
    (_is_lora, _tell_lora),
    (lambda file: file.suffix in {".gguf", ".safetensors"}, _tell_single),
    (lambda file: file.suffix in _PICKLES, describe_pickle),
    (Path.is_file, lambda file: f"{file} is a file; a checkpoint is a folder in diffusers' layout"),
)
_FOLDERS: Layouts = (
    (
        lambda folder: not any(folder.iterdir()),
        lambda folder: (
            f"{folder} has no {MODEL_INDEX}, because the folder is empty: fetch the checkpoint into it, or "
            "mount what it should hold"
        ),
    ),
    (
        lambda folder: any((folder.parent / name).is_file() for name in _INDEXES),
        lambda folder: (
            f"{folder} is one component of a checkpoint: name the folder that it is in, {folder.parent}"
        ),
    ),
    (_has("pytorch_lora_weights*", "adapter_model*", "adapter_config.json", "*lora*.safetensors"), _tell_lora),
    (
        _has("Wan*_VAE*.pth", "models_t5_umt5*.pth"),
        lambda folder: (
            f"{folder} is Wan's original layout, not diffusers'. Fetch the repository on the hub whose "
            "name ends in -Diffusers"
        ),
    ),
    (
        _has(*(f"*/{name}" for name in _INDEXES)),
        lambda folder: (
            f"{folder} has no {MODEL_INDEX}, but a folder in it has one: name that folder, "
            f"{min(file for name in _INDEXES for file in folder.glob(f'*/{name}')).parent}"
        ),
    ),
    (
        _has("config.json"),
        lambda folder: (
            f"{folder} holds one model, not a pipeline: it has a config.json and no {MODEL_INDEX}. Name "
            "the folder of a whole checkpoint in diffusers' layout"
        ),
    ),
    (_has(*(f"*{ending}" for ending in _WEIGHTS)), _tell_weights),
    (
        _has("*/config.json"),
        lambda folder: f"{folder} has components but no {MODEL_INDEX}: fetch that file too",
    ),
    (Path.exists, lambda folder: f"{folder} has no {MODEL_INDEX}; it must be a folder in diffusers' layout"),
)
