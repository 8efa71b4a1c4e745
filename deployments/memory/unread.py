"""Detects weights of a file that diffusers' `from_single_file` does not use, which it only reports in its log."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LOGGER = "diffusers.loaders.single_file_model"
_TELLING = "were not used when initializing"


class _Listener(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.told: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if _TELLING in message:
            names = message.partition("['")[2]
            self.told += names.rstrip("']").split(", ")


@contextmanager
def refuse_unread(file: Path) -> Iterator[None]:
    """Context around loading a file; raises ValueError at its end if diffusers has logged unused weights."""
    logger, listener = logging.getLogger(_LOGGER), _Listener()
    level = logger.level
    logger.addHandler(listener)
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.removeHandler(listener)
        logger.setLevel(level)
    if listener.told:
        raise ValueError(
            f"{file} has weights that nothing reads, {listener.told[0]} ({len(listener.told)} in all): it belongs "
            "to another model than the configs, or has a format that diffusers does not know"
        )
