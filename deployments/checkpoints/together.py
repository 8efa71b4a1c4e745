"""Assembles a checkpoint in the user's cache: a folder of links to files elsewhere, and of small files."""

import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path

from filelock import FileLock

CACHE = Path(".cache") / "latent-relay" / "files"
"""Relative to the user's home."""


def put_together(links: Mapping[str, Path], files: Mapping[str, str] | None = None) -> Path:
    """Returns the assembled folder, equal for equal arguments. links: targets by name; files: texts by name.

    Safe for concurrent processes: the folder is renamed into place when complete.
    """
    files, links = files or {}, {name: target.absolute() for name, target in links.items()}
    told = [f"{name} {target}" for name, target in sorted(links.items())]
    told += [f"{name} {text}" for name, text in sorted(files.items())]
    digest = hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]
    folder = Path.home() / CACHE / f"together-{digest}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as building:
                made = Path(building) / folder.name
                made.mkdir()
                for name, target in links.items():
                    (made / name).symlink_to(target)
                for name, text in files.items():
                    (made / name).write_text(text, encoding="utf-8")
                made.rename(folder)
    return folder
