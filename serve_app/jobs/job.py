"""What is known of one job."""

import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["video", "image"]
BodyKind = Literal["generation", "edit", "video"]
Status = Literal["receiving", "queued", "in_progress", "completed", "failed", "cancelled"]
"""Receiving: what goes in is not stored yet, and nobody knows of the job."""
WAITING: tuple[Status, ...] = ("receiving", "queued")
UNFINISHED: tuple[Status, ...] = ("queued", "in_progress")


@dataclass(frozen=True)
class Asked:
    """What a job is to make. All of it is JSON."""

    body_kind: BodyKind
    fields: Mapping[str, Any]
    """Of the body, with the seed, without files."""
    inputs: Mapping[str, list[str]]
    """Files that go in, by the body's field."""
    takes_several: tuple[str, ...]
    """Fields that are lists of files."""
    width: int
    height: int
    num_frames: int
    fps: int
    num_outputs: int
    remixed_from: str | None = None


@dataclass(frozen=True)
class Output:
    """One picture or video."""

    file: str
    media_type: str
    num_bytes: int
    facts: Mapping[str, Any]
    """How it was drawn."""


@dataclass(frozen=True)
class Failure:
    """Why there is none, as the API tells errors."""

    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True)
class Job:
    """As it is in the store. Times are in seconds since 1970."""

    id: str
    kind: Kind
    model: str
    owner: str | None
    """The API key's name; None without keys."""
    created_at: float
    asked: Asked
    status: Status = "receiving"
    progress: int = 0
    """Percent."""
    completed_at: float | None = None
    """When it ended, well or not."""
    expires_at: float | None = None
    outputs: tuple[Output, ...] = ()
    failure: Failure | None = None
    runner: str | None = None
    beat: int = 0
    """Grows with all that its runner says of it, and when it changes hands."""
    num_taken: int = 0
    """How often it was taken up."""


@dataclass(frozen=True)
class Open:
    """What runners look at, of a job that has not ended."""

    id: str
    status: Status
    runner: str | None
    beat: int


@dataclass(frozen=True)
class Ending:
    """How a job ends."""

    status: Literal["completed", "failed"]
    outputs: tuple[Output, ...] = ()
    failure: Failure | None = None


@dataclass(frozen=True)
class Page:
    """Which part of a list of jobs."""

    limit: int = 20
    after: str | None = None
    order: Literal["asc", "desc"] = "desc"


@dataclass(frozen=True)
class Found:
    """A page of them."""

    jobs: list[Job] = field(default_factory=list)
    has_more: bool = False


def new_id(kind: Kind, owner: str | None, same: str | None = None) -> str:
    """Not to be guessed; or, of requests that are the same by an Idempotency-Key of their owner's, the same."""
    if same is None:
        return f"{kind}_{secrets.token_hex(16)}"
    return f"{kind}_{hashlib.sha256(repr((owner, same)).encode()).hexdigest()[:32]}"
