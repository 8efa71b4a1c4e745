"""Config of the journal from which a request is resumed, and its parts that are being saved. Imports no torch."""

from collections.abc import Callable

from pydantic import Field

from cluster.config import Config
from deployments.answers import JournalPart

PART_SUFFIX = ".steps"
"""Suffix of files that each hold one part of a journal."""


class ResumeConfig(Config):
    """Predictions of a request are kept outside of its replica, so that another can continue if it dies."""

    every_steps: int | None = Field(
        4,
        ge=1,
        description="predictions are saved every this many steps, so at most this many are computed again; null: "
        "never",
    )
    every_s: float = Field(
        1.0,
        ge=0,
        description="minimum seconds between two saves; a save takes some milliseconds",
    )
    max_mib: float = Field(
        1024.0,
        gt=0,
        description="maximum that is kept of one request; each forward adds the size of its latents; beyond this, "
        "nothing more is kept",
    )


class UnsavedPart:
    """The next part of a journal, whose tensors may still be being copied to the CPU."""

    def __init__(self, part: JournalPart, wait: Callable[[], None]) -> None:
        self._part, self._wait = part, wait
        self.is_saved = False
        """Set once the part has been saved; the next part is not made before."""

    def read(self) -> JournalPart:
        """Returns the part; blocks until its tensors are on the CPU."""
        self._wait()
        return self._part


OnPart = Callable[[UnsavedPart], None]
