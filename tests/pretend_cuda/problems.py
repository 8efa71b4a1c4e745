"""Reads the problems that the simulated GPUs have reported."""

from pathlib import Path


class Problems:
    """The problems of all processes so far."""

    def __init__(self, path: Path) -> None:
        """path: the file that the device writes them to."""
        self._path, self._num_read = path, 0
        self._path.touch()

    def take(self) -> list[str]:
        """Returns the problems since the last call, each once."""
        with self._path.open() as file:
            file.seek(self._num_read)
            lines = file.read().splitlines()
            self._num_read = file.tell()
        return list(dict.fromkeys(line.partition(": ")[2] for line in lines))
