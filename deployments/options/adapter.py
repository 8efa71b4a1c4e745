"""LoRA adapters of a served model: their config, and those of a request. Imports no torch."""

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
        None, description="for the second denoiser (Wan 2.2 A14B's expert for low noise); null: it has no adapter"
    )
    scale: float = Field(1.0, ge=-10, le=10, description="scale for requests that name none")
    about: str = Field("", description="a line that describes it, on the page and in /v1/models")


@dataclass(frozen=True)
class Adapter:
    """An adapter as the stages load it. Equal if its weights are equal, judged by file times and sizes."""

    name: str
    source: str
    revision: str | None = None
    weight_name: str | None = None
    source_2: str | None = None
    version: str = ""
    """Changes when local files change; empty for hub ids."""


@dataclass(frozen=True)
class ScaledAdapter:
    """An adapter of one request, with its scale."""

    adapter: Adapter
    scale: float


class AdapterCatalog:
    """The adapters that requests may name: those of the config, and those that are in the folder at the moment."""

    def __init__(self, adapters: Mapping[str, AdapterConfig], folder: str | None) -> None:
        self._said = dict(adapters)
        self._folder = None if folder is None else Path(folder).expanduser().absolute()
        self._found: dict[str, AdapterConfig] = {}
        self._looked = -_LOOK_AGAIN_S

    def entries(self) -> dict[str, AdapterConfig]:
        """Returns the adapters' configs by name, sorted. The config's own override those of the folder."""
        if self._folder is not None and time.monotonic() - self._looked >= _LOOK_AGAIN_S:
            self._looked = time.monotonic()
            self._found = _look_into(self._folder)
        return dict(sorted((self._found | self._said).items()))

    def find(self, name: str) -> Adapter | None:
        """Returns an adapter by its name, or None."""
        entry = self.entries().get(name)
        if entry is None:
            return None
        sources = [source for source in (entry.source, entry.source_2) if source is not None]
        version = " ".join(_version(Path(source).expanduser()) for source in sources)
        return Adapter(name, entry.source, entry.revision, entry.weight_name, entry.source_2, version)


def find_missing(adapters: Mapping[str, AdapterConfig], folder: str | None) -> list[str]:
    """Returns one line for each configured path that does not exist."""
    faults = [
        f"model.adapters.{name}.{key}: {source} does not exist"
        for name, adapter in adapters.items()
        for key, source in (("source", adapter.source), ("source_2", adapter.source_2))
        if source is not None and is_path(source) and not Path(source).expanduser().exists()
    ]
    if folder is not None and not Path(folder).expanduser().is_dir():
        faults.append(f"model.adapters_folder: {folder} is not a folder")
    return faults


def is_path(source: str) -> bool:
    """Whether an adapter's source is a path; otherwise it is a hub id, OWNER/NAME."""
    return source.startswith(("/", ".", "~")) or source.endswith(WEIGHTS_SUFFIX)


def _look_into(folder: Path) -> dict[str, AdapterConfig]:
    """Returns configs of the adapter files, and of the folders with such files; ignores all other entries."""
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
