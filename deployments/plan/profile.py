"""Measured times of one checkpoint, as `relay profile` writes them."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deployments.request import MediaSize


@dataclass(frozen=True)
class Times:
    """Of one picture or video, alone, in seconds."""

    encode_s: float
    head_s: float
    """Of one forward of the denoiser, what is in no block and every rank computes."""
    blocks_s: tuple[float, ...]
    """Of one forward, each block."""
    tail_s: float
    """Of one forward, after the last block."""
    num_forwards: int
    """Of the denoiser, per picture."""
    decode_s: float
    working_bytes: Mapping[str, int] | None = None
    """Measured on CUDA, by stage: the peak of one picture less the weights."""

    def rank_s(self, start: int, end: int) -> float:
        """Of one picture on the rank that has blocks `start:end`."""
        tail_s = self.tail_s if end == len(self.blocks_s) else 0.0
        return self.num_forwards * (self.head_s + sum(self.blocks_s[start:end]) + tail_s)


@dataclass(frozen=True)
class Profile:
    """Times by size, and where they were measured."""

    machine: Mapping[str, str]
    checkpoint: str
    times: Mapping[str, Times]
    """By `str(MediaSize)`."""

    def at(self, size: MediaSize) -> Times:
        """Raises KeyError naming the sizes that were measured."""
        try:
            return self.times[str(size)]
        except KeyError:
            raise KeyError(f"no times for {size} in the profile; it has {', '.join(self.times)}") from None


def write_profile(profile: Profile, path: Path) -> None:
    path.write_text(json.dumps(asdict(profile), indent=1) + "\n")


def read_profile(path: Path) -> Profile:
    """Raises ValueError if the file is no profile."""
    try:
        raw: dict[str, Any] = json.loads(path.read_text())
        times = {
            size: Times(**{**entry, "blocks_s": tuple(entry["blocks_s"])}) for size, entry in raw["times"].items()
        }
        return Profile(raw["machine"], raw["checkpoint"], times)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no profile: {error}; write one by `relay profile`") from error
