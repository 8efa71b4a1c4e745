"""Writes a file where it will be read: to a shared folder, or to an object store. Imports no torch."""

import contextlib
import uuid

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem


def write_file(url: str, data: bytes) -> bool:
    """Writes a file completely or not at all: first under another name, then by a rename. Raises OSError.

    Returns False, without writing, if the folder is not on this machine: the process that has made the folder must
    write the file.
    """
    files, path = url_to_fs(url)
    folder = path.rpartition("/")[0]
    if isinstance(files, LocalFileSystem) and not files.isdir(folder):
        return False
    part = f"{path}.{uuid.uuid4().hex}.part"
    try:
        with files.open(part, "wb") as file:
            file.write(data)
        files.mv(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            files.rm(part)
        raise
    return True


def thumbnail_of(video: str) -> str:
    """Returns the name or URL of the still image beside a video."""
    return f"{video}.webp"
