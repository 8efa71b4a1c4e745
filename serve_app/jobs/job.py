"""The data of one job: what it asks for, its state and its outputs."""

import hashlib
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Kind = Literal["video", "image"]
BodyKind = Literal["generation", "edit", "video"]
Status = Literal["receiving", "queued", "in_progress", "completed", "failed", "cancelled"]
"""`receiving`: the input files are not stored yet, and neither clients nor runners see the job."""
WAITING: tuple[Status, ...] = ("receiving", "queued")
UNFINISHED: tuple[Status, ...] = ("queued", "in_progress")
ID = re.compile(r"[\w-]{1,64}", re.ASCII)
"""The form of every job ID. No job has another; some databases even reject a query for other strings."""


@dataclass(frozen=True)
class Asked:
    """What a job is to make. All fields are JSON-serializable."""

    body_kind: BodyKind
    fields: Mapping[str, Any]
    """The body's fields, with the seed, without files."""
    inputs: Mapping[str, list[str]]
    """Names of the input files, by the body's field."""
    takes_several: tuple[str, ...]
    """The body's fields that are lists of files."""
    width: int
    height: int
    num_frames: int
    fps: int
    num_outputs: int
    remixed_from: str | None = None
    megapixel_steps: float = 0.0
    """Cost of the job, which its key is charged."""

    def is_like(self, other: "Asked") -> bool:
        """Whether both may come from one request, sent twice. Ignores the seed, which may have been random."""
        mine, others = (replace(each, fields={**each.fields, "seed": 0}) for each in (self, other))
        return mine == others


@dataclass(frozen=True)
class Output:
    """One image or video."""

    file: str
    media_type: str
    num_bytes: int
    facts: Mapping[str, Any]
    """How the output was generated."""
    thumbnail: str | None = None
    """File of the still image for a video; None: there is none."""

    @property
    def files(self) -> list[str]:
        return [self.file, *([self.thumbnail] if self.thumbnail else [])]


@dataclass(frozen=True)
class Failure:
    """Why a job failed, in the fields of an API error."""

    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True)
class Job:
    """A job as it is stored. Times are in seconds since 1970."""

    id: str
    kind: Kind
    model: str
    owner: str | None
    """The API key's name; None without keys."""
    created_at: float
    asked: Asked
    status: Status = "receiving"
    progress: int = 0
    """Progress in percent."""
    completed_at: float | None = None
    """When the job ended, successfully or not."""
    expires_at: float | None = None
    outputs: tuple[Output, ...] = ()
    failure: Failure | None = None
    runner: str | None = None
    beat: int = 0
    """Grows with every update by the job's runner, and whenever the job's runner changes."""
    num_taken: int = 0
    """How often a runner has taken the job, without those that gave it back."""


@dataclass(frozen=True)
class Open:
    """The fields of an unfinished job that runners read."""

    id: str
    model: str
    status: Status
    runner: str | None
    beat: int


@dataclass(frozen=True)
class Ending:
    """The status, outputs and failure with which a job ends."""

    status: Literal["completed", "failed"]
    outputs: tuple[Output, ...] = ()
    failure: Failure | None = None


@dataclass(frozen=True)
class Page:
    """Which part of a list of jobs is asked for."""

    limit: int = 20
    after: str | None = None
    order: Literal["asc", "desc"] = "desc"


@dataclass(frozen=True)
class Found:
    """One page of jobs."""

    jobs: list[Job] = field(default_factory=list)
    has_more: bool = False


def new_id(kind: Kind, owner: str | None, same: str | None = None) -> str:
    """Returns an ID that cannot be guessed, or one derived from the owner and the Idempotency-Key `same`."""
    if same is None:
        return f"{kind}_{secrets.token_hex(16)}"
    return f"{kind}_{hashlib.sha256(repr((owner, same)).encode()).hexdigest()[:32]}"
