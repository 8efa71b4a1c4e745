"""A file that is written where it will be read: a folder that both ends see, or an object store. Torch-free."""

import contextlib
import uuid

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem


def write_file(url: str, data: bytes) -> bool:
    """Whole, or not at all: under another name first. Raises OSError.

    False, and nothing was written: the folder is not on this machine, so it is for whoever has made it to write.
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
