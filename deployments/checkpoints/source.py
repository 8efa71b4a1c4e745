"""Finds a checkpoint's family, and a local folder with the requested components.

    "embedded://NAME"                 trained weights that come with this package
    "tiny://flux"                     random weights, written once per machine
    "/models/flux", "./flux", "~/x"   a local folder in diffusers' layout
    "black-forest-labs/FLUX.1-dev"    a Hugging Face hub id

Imports no torch and no diffusers, because the ingress and the planner use it, too.
"""

import importlib
import socket
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from deployments.checkpoints.byte_order_mark import without_byte_order_marks
from deployments.checkpoints.derived import derive_family
from deployments.checkpoints.json_file import read_settings
from deployments.checkpoints.layout import describe_other_layout, open_hub_cache
from deployments.checkpoints.modular import MODEL_INDEX, MODULAR_INDEX, open_modular
from deployments.checkpoints.tiny.names import TINY_MODULES
from deployments.checkpoints.weights import find_file_faults
from deployments.config.model import ModelConfig
from deployments.families import FAMILIES

FAMILY_BY_PIPELINE = {family.pipeline_class: name for name, family in FAMILIES.items()}
"""Family by `_class_name` in a checkpoint's model_index.json."""

_EMBEDDED_PREFIX = "embedded://"
_EMBEDDED_FOLDER = Path(__file__).parent / "embedded"

_TINY_PREFIX = "tiny://"
_TINY_FORMAT = 14
"""Part of the cache's path. Raise it whenever the bytes that `write_tiny_checkpoint` writes change."""


def with_family(model: ModelConfig) -> ModelConfig:
    """Returns a copy with the family from the config, or else from the checkpoint.

    Raises the errors of `detect_family` and `derive_family`.
    """
    if model.has_derived_family:
        return model
    family = model.family or detect_family(model.layout, model.revision)
    if family in FAMILIES:
        return model.model_copy(update={"family": family})
    return model.with_derived_family(*derive_family(fetch_configs(model.layout, revision=model.revision), family))


def detect_family(checkpoint: str, revision: str | None) -> str:
    """Returns the family of `checkpoint`, or the name of its pipeline class if no family has that class.

    From the hub it fetches only model_index.json.

    Raises:
        ValueError: the embedded or tiny checkpoint does not exist.
        FileNotFoundError: a local path does not exist or has no model_index.json, or the hub does not provide it.
    """
    folder = local_folder(checkpoint, revision)
    if is_tiny(checkpoint):
        name = _tiny_name(checkpoint, TINY_MODULES)
        if name in FAMILIES:
            return name
        index_file = _fetch_tiny(name) / MODEL_INDEX
    elif folder is None:
        index_file = _download_index(checkpoint, revision)
    else:
        _check_complete(folder, components=())
        index_file = folder / MODEL_INDEX
    pipeline = str(read_settings(index_file).get("_class_name") or f"pipeline that {MODEL_INDEX} does not name")
    return FAMILY_BY_PIPELINE.get(pipeline, pipeline)


def fetch_checkpoint(
    checkpoint: str,
    components: Collection[str],
    *,
    revision: str | None = None,
    variant: str | None = None,
) -> Path:
    """Returns a local folder that holds model_index.json and every one of `components` (subfolders).

    `revision` and `variant` select what is downloaded from the hub; `revision` also selects a snapshot in a folder
    of the hub's cache. Safe for concurrent processes: tiny checkpoints are written under a file lock, and
    huggingface_hub locks its own downloads.

    Raises:
        ValueError: an embedded or tiny checkpoint does not exist.
        FileNotFoundError: a local path does not exist, the checkpoint lacks a component, or the hub does not
            provide it.
    """
    if is_tiny(checkpoint):
        folder = _fetch_tiny(_tiny_name(checkpoint, TINY_MODULES))
    else:
        local = local_folder(checkpoint, revision)
        folder = local or _download(checkpoint, frozenset(components), revision, variant)
    _check_complete(folder, components)
    return without_byte_order_marks(folder)


def fetch_configs(checkpoint: str, *, revision: str | None = None) -> Path:
    """Returns a local folder with model_index.json and all configs; fetches no other files of the hub.

    Raises the errors of `detect_family`.
    """
    if is_tiny(checkpoint):
        return _fetch_tiny(_tiny_name(checkpoint, TINY_MODULES))
    folder = local_folder(checkpoint, revision)
    if folder is None:
        patterns = [MODEL_INDEX, MODULAR_INDEX, "*/*config.json", "scheduler/*.json"]
        with asking_hub(checkpoint):
            folder = Path(snapshot_download(checkpoint, revision=revision, allow_patterns=patterns))
        folder = open_modular(folder, checkpoint)
    _check_complete(folder, ())
    return without_byte_order_marks(folder)


def local_folder(checkpoint: str, revision: str | None = None) -> Path | None:
    """Returns the folder that `checkpoint` names, embedded or by path; None for hub ids and tiny checkpoints.

    Raises:
        ValueError: an embedded checkpoint does not exist.
        FileNotFoundError: a path does not exist, or a folder of the hub's cache lacks the revision.
    """
    if is_tiny(checkpoint):
        return None
    if checkpoint.startswith(_EMBEDDED_PREFIX):
        return _embedded_folder(checkpoint)
    try:
        path = Path(checkpoint).expanduser()
    except RuntimeError as error:
        raise FileNotFoundError(
            f"checkpoint {checkpoint!r} names a user that does not exist on {_node()}"
        ) from error
    if path.exists():
        return open_modular(open_hub_cache(path, revision))
    if checkpoint in (".", "..") or checkpoint.startswith(("/", "./", "../", "~")):
        raise FileNotFoundError(
            f"checkpoint {checkpoint!r} looks like a path, but {path.absolute()} does not exist on {_node()}"
        )
    return None


def fetch_file(file: str, must_be: str) -> Path:
    """Returns the local path of a file, given by its path or as OWNER/NAME/FILE of the hub.

    must_be: how the error's message begins. Raises FileNotFoundError.
    """
    path = Path(file).expanduser()
    if path.is_file():
        return path
    owner, _, rest = file.partition("/")
    name, _, within = rest.partition("/")
    is_path = path.exists() or file.startswith(("/", "./", "../", "~"))
    if is_path or not (owner and name and within):
        what = "is a folder" if path.is_dir() else f"does not exist on {_node()}"
        raise FileNotFoundError(f"{must_be}, and {path.absolute()} {what}")
    with asking_hub(f"{owner}/{name}"):
        return Path(hf_hub_download(f"{owner}/{name}", within))


def plan_hub_patterns(components: Collection[str], variant: str | None) -> tuple[list[str], list[str]]:
    """Returns a download's (allow, ignore) patterns: configs, tokenizer files, one variant's safetensors.

    A variant's files have one more dot than the plain ones: `model.fp16.safetensors`, and in parts either
    `model-00001-of-00002.fp16.safetensors` or `model.fp16-00001-of-00002.safetensors`. Weights at the root of
    a repository lie in no component and never match.
    """
    endings = ["*.json", "*.txt", "*.model", "*.jinja"]
    if variant is None:
        endings.append("*.safetensors")
        ignore = ["*.*.safetensors"]
    else:
        endings += [f"*.{variant}.safetensors", f"*.{variant}-*.safetensors"]
        ignore = []
    return [
        MODEL_INDEX,
        MODULAR_INDEX,
        *(f"{component}/{ending}" for component in components for ending in endings),
    ], ignore


def is_tiny(checkpoint: str) -> bool:
    """Whether the checkpoint's weights are random, and written on first use."""
    return checkpoint.startswith(_TINY_PREFIX)


def _tiny_name(checkpoint: str, names: Collection[str]) -> str:
    name = checkpoint.removeprefix(_TINY_PREFIX)
    if name not in names:
        raise ValueError(f"checkpoint {checkpoint!r} is not a tiny checkpoint; choose one of: {', '.join(names)}")
    return name


def _fetch_tiny(name: str) -> Path:
    """Returns the tiny checkpoint's folder, written on first use and renamed into place when complete."""
    tag = f"diffusers-{version('diffusers')}-format-{_TINY_FORMAT}"
    folder = Path.home() / ".cache" / "latent-relay" / "tiny" / tag / name
    if folder.is_dir():
        return open_modular(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f"{name}.lock"):
        if not folder.is_dir():  # another process may have written it while we waited
            importlib.import_module("deployments.checkpoints.tiny.write").write_tiny_checkpoint(name, folder)
    return open_modular(folder)


def _embedded_folder(checkpoint: str) -> Path:
    name = checkpoint.removeprefix(_EMBEDDED_PREFIX)
    names = sorted(index.parent.name for index in _EMBEDDED_FOLDER.glob(f"*/{MODEL_INDEX}"))
    if name not in names:
        raise ValueError(f"checkpoint {checkpoint!r} is not embedded; choose one of: {', '.join(names)}")
    return _EMBEDDED_FOLDER / name


@cache
def _download(checkpoint: str, components: frozenset[str], revision: str | None, variant: str | None) -> Path:
    """Downloads a checkpoint. Cached per process, because each call queries the hub."""
    allow, ignore = plan_hub_patterns(components, variant)
    with asking_hub(checkpoint):
        fetched = snapshot_download(checkpoint, revision=revision, allow_patterns=allow, ignore_patterns=ignore)
    return open_modular(Path(fetched), checkpoint)


def _download_index(checkpoint: str, revision: str | None) -> Path:
    """Fetches model_index.json, or that of a modular pipeline, which has `_class_name`, too."""
    with asking_hub(checkpoint):
        try:
            return Path(hf_hub_download(checkpoint, MODEL_INDEX, revision=revision))
        except EntryNotFoundError:
            return Path(hf_hub_download(checkpoint, MODULAR_INDEX, revision=revision))


@contextmanager
def asking_hub(checkpoint: str) -> Iterator[None]:
    """Context around a call of the hub: turns its errors into a FileNotFoundError that says what to do."""
    no_folder = f"if you mean a folder: {Path(checkpoint).absolute()} does not exist on {_node()} either"
    try:
        yield
    except GatedRepoError as error:
        raise FileNotFoundError(
            f"checkpoint {checkpoint!r} is gated on the hub: accept its licence at https://huggingface.co/"
            f"{checkpoint}, and set HF_TOKEN to a token of that account on every node; if you only plan, "
            "give relay plan a folder of its config files with --configs"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise FileNotFoundError(
            f"checkpoint {checkpoint!r} is not on the hub, or private (then set HF_TOKEN); {no_folder}"
        ) from error
    except (HfHubHTTPError, EntryNotFoundError, OfflineModeIsEnabled) as error:
        why = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"checkpoint {checkpoint!r} could not be fetched from the hub: {why}; {no_folder}"
        ) from error


def _node() -> str:
    return f"node {socket.gethostname()}"


def _check_complete(folder: Path, components: Collection[str]) -> None:
    index = folder / MODEL_INDEX
    if not index.is_file() and not index.is_symlink():
        raise FileNotFoundError(describe_other_layout(folder))
    for fault in find_file_faults(index):
        raise FileNotFoundError(fault)
    missing = sorted(component for component in components if not (folder / component).is_dir())
    if missing:
        present = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing)}; it holds {', '.join(present) or 'no component'}"
        )
