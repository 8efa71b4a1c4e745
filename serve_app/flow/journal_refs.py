"""References to the journal from which a lost denoise is resumed."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class JournalRefs:
    """Where the journal's parts are: in files, or in Ray's object store."""

    url: str | None
    """URL of the files; None: the journal is in `parts`."""
    parts: list[Any] = field(default_factory=list)
    """References that this process owns, so that the parts outlive the replica that created them."""
