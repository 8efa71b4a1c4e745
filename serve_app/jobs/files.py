"""What goes into jobs and comes out of them: a folder for each, wherever fsspec reaches."""

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from deployments.target_file import write_file

PIECE_BYTES = 2**20


class JobFiles:
    """Blocking calls, from any thread. All raise OSError."""

    def __init__(self, url: str) -> None:
        """url: of the folder of all; a path will do."""
        # What other processes write is not in a list that this one keeps.
        self._files, self._root = url_to_fs(url, use_listings_cache=False)
        self._is_local = isinstance(self._files, LocalFileSystem)

    def url(self, job_id: str, name: str) -> str:
        """For another process."""
        return str(self._files.unstrip_protocol(self._path(job_id, name)))

    def make_folder(self, job_id: str) -> None:
        """Before anything is written; in an object store nothing is to be made."""
        if self._is_local:
            self._files.makedirs(self._path(job_id), exist_ok=True)

    def write(self, job_id: str, name: str, data: bytes) -> None:
        """Whole, or not at all."""
        with _reaching():
            if not write_file(self.url(job_id, name), data):
                raise OSError(f"the job's folder is not there: {self._path(job_id)}")

    def read(self, job_id: str, name: str) -> bytes:
        with _reaching():
            data: bytes = self._files.cat_file(self._path(job_id, name))
            return data

    def check(self, job_id: str, name: str) -> None:
        """Raises FileNotFoundError."""
        with _reaching():
            self._files.info(self._path(job_id, name))

    def pieces(self, job_id: str, name: str, start: int, end: int) -> Iterator[bytes]:
        """Of bytes start to end."""
        with self._files.open(self._path(job_id, name), "rb", block_size=PIECE_BYTES) as file:
            file.seek(start)
            while start < end and (piece := file.read(min(PIECE_BYTES, end - start))):
                start += len(piece)
                yield piece

    def remove(self, job_id: str, name: str | None = None) -> None:
        """One file, or all of the job. What is not there is no error."""
        with contextlib.suppress(FileNotFoundError), _reaching():
            self._files.rm(self._path(job_id, name), recursive=name is None)

    def _path(self, job_id: str, name: str | None = None) -> str:
        return "/".join((self._root, job_id, *([name] if name else [])))


@contextmanager
def _reaching() -> Iterator[None]:
    """Object stores raise what they like."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
