"""The input and output files of jobs: one folder per job, on any file system that fsspec supports."""

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from deployments.media.target_file import write_file
from deployments.options.resume import PART_SUFFIX

PIECE_BYTES = 2**20


class JobFiles:
    """The files of all jobs. The methods block, may be called from any thread, and raise OSError."""

    def __init__(self, url: str) -> None:
        """url: URL or path of the folder that holds the jobs' folders."""
        # A cached listing would lack what other processes write.
        self._files, self._root = url_to_fs(url, use_listings_cache=False)
        self._is_local = isinstance(self._files, LocalFileSystem)

    def url(self, job_id: str, name: str) -> str:
        """Returns the file's URL, for use in another process."""
        return str(self._files.unstrip_protocol(self._path(job_id, name)))

    def make_folder(self, job_id: str) -> None:
        """Creates the job's folder, before anything is written. An object store needs none."""
        if self._is_local:
            self._files.makedirs(self._path(job_id), exist_ok=True)

    def write(self, job_id: str, name: str, data: bytes) -> None:
        """Writes the file atomically."""
        with _reaching():
            if not write_file(self.url(job_id, name), data):
                raise OSError(f"the job's folder does not exist: {self._path(job_id)}")

    def read(self, job_id: str, name: str) -> bytes:
        with _reaching():
            data: bytes = self._files.cat_file(self._path(job_id, name))
            return data

    def size(self, job_id: str, name: str) -> int:
        """Returns the size in bytes. Raises FileNotFoundError."""
        with _reaching():
            return int(self._files.info(self._path(job_id, name))["size"])

    def pieces(self, job_id: str, name: str, start: int, end: int) -> Iterator[bytes]:
        """Yields bytes start to end (exclusive), at most PIECE_BYTES at a time."""
        with self._files.open(self._path(job_id, name), "rb", block_size=PIECE_BYTES) as file:
            file.seek(start)
            while start < end and (piece := file.read(min(PIECE_BYTES, end - start))):
                start += len(piece)
                yield piece

    def remove(self, job_id: str, name: str | None = None) -> None:
        """Deletes one file, or the job's folder if name is None. A missing file is no error."""
        with contextlib.suppress(FileNotFoundError), _reaching():
            self._files.rm(self._path(job_id, name), recursive=name is None)

    def remove_steps(self, job_id: str) -> None:
        """Deletes the finished steps that stages have stored for the next attempt."""
        with contextlib.suppress(FileNotFoundError), _reaching():
            for path in self._files.glob(self._path(job_id, f"*{PART_SUFFIX}")):
                self._files.rm(path)

    def _path(self, job_id: str, name: str | None = None) -> str:
        return "/".join((self._root, job_id, *([name] if name else [])))


@contextmanager
def _reaching() -> Iterator[None]:
    """Turns every exception into an OSError: clients of object stores raise exceptions of many kinds."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
