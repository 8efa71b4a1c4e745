"""Measured times of one checkpoint, as `relay profile` writes them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.partition import plan_cuts
from deployments.request import MediaSize


@dataclass(frozen=True)
class DenoiserTimes:
    """Of one denoiser, in seconds."""

    head_s: float
    """Of one forward, what is in no block and every rank computes."""
    blocks_s: tuple[float, ...]
    """Of one forward, each block."""
    tail_s: float
    """Of one forward, after the last block."""
    num_forwards: int
    """Per picture."""

    def rank_s(self, start: int, end: int) -> float:
        """Of one picture on the rank that has blocks `start:end`."""
        tail_s = self.tail_s if end == len(self.blocks_s) else 0.0
        return self.num_forwards * (self.head_s + sum(self.blocks_s[start:end]) + tail_s)


@dataclass(frozen=True)
class Times:
    """Of one picture or video, alone, in seconds."""

    encode_s: float
    denoisers: Mapping[str, DenoiserTimes]
    """By component name, in the order of the checkpoint's index."""
    decode_s: float
    working_bytes: Mapping[str, int] | None = None
    """Measured on CUDA, by stage: the peak of one picture less the weights."""

    def rank_s(self, blocks: Sequence[tuple[int, int]] | None) -> float:
        """Of one picture on the rank that has these blocks of each denoiser; None: all."""
        blocks = blocks or [(0, len(of.blocks_s)) for of in self.denoisers.values()]
        return sum(of.rank_s(*own) for of, own in zip(self.denoisers.values(), blocks, strict=True))

    def plan_cuts(self, num_ranks: int) -> tuple[int, ...] | None:
        """Those that make the slowest rank the fastest, with both ends; None where the denoisers have not as many
        blocks each, so that no `cuts` are right for all."""
        of = [
            [denoiser.num_forwards * block_s for block_s in denoiser.blocks_s]
            for denoiser in self.denoisers.values()
        ]
        if len(set(map(len, of))) > 1:
            return None
        tail_s = sum(denoiser.num_forwards * denoiser.tail_s for denoiser in self.denoisers.values())
        return plan_cuts([sum(at) for at in zip(*of, strict=True)], num_ranks, tail_cost=tail_s)


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
        times = {size: _read_times(entry) for size, entry in raw["times"].items()}
        return Profile(raw["machine"], raw["checkpoint"], times)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no profile: {error}; write one by `relay profile`") from error


def _read_times(entry: Mapping[str, Any]) -> Times:
    denoisers = {
        name: DenoiserTimes(**{**of, "blocks_s": tuple(of["blocks_s"])}) for name, of in entry["denoisers"].items()
    }
    return Times(**{**entry, "denoisers": denoisers})
