"""Copies checkpoints whose JSON files have byte order marks, which diffusers refuses, without the marks.

Only the marked files are copied; all other files in the copy are links to the checkpoint.
"""

import codecs
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

_COPIES = Path(".cache") / "latent-relay" / "without-byte-order-marks"
"""Relative to the user's home."""


def without_byte_order_marks(checkpoint: Path) -> Path:
    """Returns the folder itself, or a copy whose JSON files have no mark. Safe for concurrent processes."""
    marked = [path for path in (*checkpoint.glob("*.json"), *checkpoint.glob("*/*.json")) if _has_mark(path)]
    if not marked:
        return checkpoint
    copy = Path.home() / _COPIES / _fingerprint(checkpoint)
    copy.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(copy.with_suffix(".lock")):
        if not copy.is_dir():
            unfinished = copy.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            for path in _files(checkpoint):
                _copy(path, unfinished / path.relative_to(checkpoint), has_mark=path in marked)
            unfinished.rename(copy)
    return copy


def _has_mark(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8


def _fingerprint(checkpoint: Path) -> str:
    """Returns a hash that changes when a file is added, removed or modified."""
    seen = hashlib.sha256(str(checkpoint.resolve()).encode())
    for path in _files(checkpoint):
        told = path.stat() if path.exists() else path.lstat()
        seen.update(f"{path} {told.st_mtime_ns} {told.st_size}".encode())
    return seen.hexdigest()[:16]


def _files(checkpoint: Path) -> Iterator[Path]:
    """Yields the files of the checkpoint and its components, broken links included."""
    for path in sorted((*checkpoint.glob("*"), *checkpoint.glob("*/*"))):
        if not path.is_dir():
            yield path


def _copy(path: Path, to: Path, *, has_mark: bool) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    if has_mark:
        to.write_bytes(path.read_bytes().removeprefix(codecs.BOM_UTF8))
    else:
        to.symlink_to(path.absolute())
