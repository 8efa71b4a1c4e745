"""Measured times of one checkpoint, as `relay profile` writes them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.ranks.partition import plan_cuts
from deployments.request import MediaSize


@dataclass(frozen=True)
class DenoiserTimes:
    """Times of one denoiser, in seconds."""

    head_s: float
    """Per forward: parts outside of blocks, which every rank computes."""
    blocks_s: tuple[float, ...]
    """Per forward: each block."""
    tail_s: float
    """Per forward: parts after the last block."""
    num_forwards: int
    """Forwards per image."""

    def rank_s(self, start: int, end: int) -> float:
        """Returns the seconds per image on the rank that has blocks `start:end`."""
        tail_s = self.tail_s if end == len(self.blocks_s) else 0.0
        return self.num_forwards * (self.head_s + sum(self.blocks_s[start:end]) + tail_s)


@dataclass(frozen=True)
class Times:
    """Times of one image or video that is made alone, in seconds."""

    encode_s: float
    denoisers: Mapping[str, DenoiserTimes]
    """By component name, in the order of the checkpoint's index."""
    decode_s: float
    working_bytes: Mapping[str, int] | None = None
    """By stage, measured on a GPU: the peak memory of one image, less the weights."""

    def rank_s(self, blocks: Sequence[tuple[int, int]] | None) -> float:
        """Returns the seconds per image on the rank that has these blocks of each denoiser; None: all."""
        blocks = blocks or [(0, len(of.blocks_s)) for of in self.denoisers.values()]
        return sum(of.rank_s(*own) for of, own in zip(self.denoisers.values(), blocks, strict=True))

    def plan_cuts(self, num_ranks: int) -> tuple[int, ...] | None:
        """Returns the cuts, with both ends, that make the slowest rank as fast as possible.

        None if the denoisers have different numbers of blocks, so that no `cuts` suit all of them.
        """
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
    """Times by size, and the machine on which they were measured."""

    machine: Mapping[str, str]
    checkpoint: str
    times: Mapping[str, Times]
    """Keys: `str(MediaSize)`."""

    def at(self, size: MediaSize) -> Times:
        """Returns the times for a size. Raises KeyError, naming the measured sizes."""
        try:
            return self.times[str(size)]
        except KeyError:
            raise KeyError(f"no times for {size} in the profile; it has {', '.join(self.times)}") from None


def write_profile(profile: Profile, path: Path) -> None:
    path.write_text(json.dumps(asdict(profile), indent=1) + "\n")


def read_profile(path: Path) -> Profile:
    """Reads a profile. Raises ValueError if the file is not a profile."""
    try:
        raw: dict[str, Any] = json.loads(path.read_text())
        times = {size: _read_times(entry) for size, entry in raw["times"].items()}
        return Profile(raw["machine"], raw["checkpoint"], times)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a profile: {error}; write one with `relay profile`") from error


def _read_times(entry: Mapping[str, Any]) -> Times:
    denoisers = {
        name: DenoiserTimes(**{**of, "blocks_s": tuple(of["blocks_s"])}) for name, of in entry["denoisers"].items()
    }
    return Times(**{**entry, "denoisers": denoisers})
