"""LoRA adapters of a served model: what config says of them, and what a request says. Torch-free."""

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from cluster.config import Config

ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
WEIGHTS_SUFFIX = ".safetensors"
_LOOK_AGAIN_S = 1.0


class AdapterConfig(Config):
    """One LoRA adapter."""

    source: str = Field(
        min_length=1,
        description="a .safetensors file, a folder that has one, or a hub id, in any of the layouts "
        "that diffusers reads (its own, PEFT's, kohya's, …)",
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    weight_name: str | None = Field(None, description="the file in a folder or hub id that has several")
    source_2: str | None = Field(
        None, description="of the second denoiser (Wan 2.2 A14B's expert for low noise); None: it has no adapter"
    )
    scale: float = Field(1.0, ge=-10, le=10, description="where a request says none")
    about: str = Field("", description="a line for people, on the page and in /v1/models")


@dataclass(frozen=True)
class Adapter:
    """What the stages load. Equal for equal weights, as far as files tell."""

    name: str
    source: str
    revision: str | None = None
    weight_name: str | None = None
    source_2: str | None = None
    version: str = ""
    """Of local files: changes when they do."""


@dataclass(frozen=True)
class ScaledAdapter:
    """One of a request's."""

    adapter: Adapter
    scale: float


class AdapterCatalog:
    """The adapters that requests may name: those of the config, and what lies in the folder now."""

    def __init__(self, adapters: Mapping[str, AdapterConfig], folder: str | None) -> None:
        self._said = dict(adapters)
        self._folder = None if folder is None else Path(folder).expanduser()
        self._found: dict[str, AdapterConfig] = {}
        self._looked = -_LOOK_AGAIN_S

    def entries(self) -> dict[str, AdapterConfig]:
        """By name, in order."""
        if self._folder is not None and time.monotonic() - self._looked >= _LOOK_AGAIN_S:
            self._looked = time.monotonic()
            self._found = _look_into(self._folder)
        return dict(sorted((self._found | self._said).items()))

    def find(self, name: str) -> Adapter | None:
        """None: there is no such adapter."""
        entry = self.entries().get(name)
        if entry is None:
            return None
        sources = [source for source in (entry.source, entry.source_2) if source is not None]
        version = " ".join(_version(Path(source).expanduser()) for source in sources)
        return Adapter(name, entry.source, entry.revision, entry.weight_name, entry.source_2, version)


def find_missing(adapters: Mapping[str, AdapterConfig], folder: str | None) -> list[str]:
    """One line for each that says where its files are, and they are not."""
    faults = [
        f"model.adapters.{name}.{key}: {source} is not there"
        for name, adapter in adapters.items()
        for key, source in (("source", adapter.source), ("source_2", adapter.source_2))
        if source is not None and _is_path(source) and not Path(source).expanduser().exists()
    ]
    if folder is not None and not Path(folder).expanduser().is_dir():
        faults.append(f"model.adapters_folder: {folder} is no folder")
    return faults


def _is_path(source: str) -> bool:
    """Else it is a hub id, OWNER/NAME."""
    return source.startswith(("/", ".", "~")) or source.endswith(WEIGHTS_SUFFIX)


def _look_into(folder: Path) -> dict[str, AdapterConfig]:
    """Files, and folders of files; whatever else is there is passed over."""
    found: dict[str, AdapterConfig] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        is_file = path.suffix == WEIGHTS_SUFFIX and path.is_file()
        name = path.stem if is_file else path.name
        if ADAPTER_NAME.fullmatch(name) and (is_file or any(path.glob(f"*{WEIGHTS_SUFFIX}"))):
            found[name] = AdapterConfig(source=str(path))
    return found


def _version(path: Path) -> str:
    files = sorted(path.glob(f"*{WEIGHTS_SUFFIX}")) if path.is_dir() else [path]
    try:
        stats = [file.stat() for file in files]
    except OSError:  # a hub id, or gone
        return ""
    return ",".join(f"{stat.st_mtime_ns}:{stat.st_size}" for stat in stats)
