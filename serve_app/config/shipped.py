"""The configs that come with this package, by their file names: `quickstart` is configs/quickstart.yaml."""

import difflib
import errno
import itertools
import os
import re
from pathlib import Path

_PACKAGE = Path(__file__).parent.parent
FOLDER = next(folder for folder in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if folder.is_dir())
"""In a wheel, inside the package (setup.py); in the repository, beside it."""
_SENTENCE = re.compile(r"(?P<first>.+?)[.:]( |$)")


def find_config(given: Path) -> Path:
    """Returns the given file, or else the config of that name that comes with this package.

    Raises FileNotFoundError if neither exists.
    """
    if given.is_file():
        return given
    names = [file.stem for file in _files()]
    if str(given) in names:
        return FOLDER / f"{given}.yaml"
    if given.exists():
        return given  # a folder or an unreadable file: opening it reports so
    raise FileNotFoundError(errno.ENOENT, _explain(given, names), str(given))


def _explain(given: Path, names: list[str]) -> str:
    if given.stem in names:
        return f"no such file; the config that comes with this package is called {given.stem}"
    if given.name != str(given) or given.suffix:
        return os.strerror(errno.ENOENT)
    close = difflib.get_close_matches(str(given), names, n=1)
    meant = f" (did you mean {close[0]!r}?)" if close else ""
    return f"no such file, and no shipped config of that name{meant}; `relay serve --list` lists them"


def tell_configs() -> dict[str, str]:
    """Returns the first sentence of each config, by its name."""
    return {file.stem: _first_sentence(file) for file in _files()}


def _files() -> list[Path]:
    return sorted(FOLDER.glob("*.yaml"))


def _first_sentence(file: Path) -> str:
    """Returns the first sentence of the comment at the top of the file; a colon ends it too."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), file.read_text("utf-8").splitlines())
    head = " ".join(line.lstrip("# ") for line in lines)
    found = _SENTENCE.match(head)
    return head if found is None else found["first"]
