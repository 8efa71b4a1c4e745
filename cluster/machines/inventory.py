"""The GPUs that a plan may use: their number, their memory and their nodes.

"2x16GiB"                  two GPUs of 16 GiB on one node
"2x(4x24GiB)"              two nodes of four GPUs of 24 GiB
"1x(8x80GiB)+2x(4x24GiB)"  one node of eight GPUs of 80 GiB, two nodes of four GPUs of 24 GiB

A single GPU may be "16GiB". "GB", "g" or nothing may replace "GiB": cards are sold by GB, although GiB is meant.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

USABLE_MEMORY_SHARE = 0.98
"""Share of the memory shown by `nvidia-smi` that a process can use; the driver keeps the rest. Users' torch
reports 15.70 GiB on an RTX 4080 of 16, 23.65 on an RTX 4090 of 24, and 79.1 on an A100 of 80."""
_GPUS = r"([1-9]\d*)x(\d+(?:\.\d+)?)(?:GiB|GB|G)?"
_GPU = r"()(\d+(?:\.\d+)?)(?:GiB|GB|G)"
_NODES = (rf"([1-9]\d*)x\({_GPUS}\)", rf"(){_GPUS}", rf"(){_GPU}")


@dataclass(frozen=True)
class Gpu:
    """One GPU."""

    node: int
    index: int
    """Its index on its node, from 0."""
    memory_bytes: int
    """Memory that processes can use."""

    def __str__(self) -> str:
        return f"node {self.node} GPU {self.index}"


def parse_gpus(text: str) -> tuple[Gpu, ...]:
    """Returns the GPUs in node order. `text` gives the memory that `nvidia-smi` shows: cards with ECC show less
    than what is sold.

    Raises ValueError if text does not have the form above.
    """
    gpus: list[Gpu] = []
    node = 0
    for part in text.replace(" ", "").split("+"):
        for num_gpus, gib in _nodes(part):
            gpus += [Gpu(node, index, int(USABLE_MEMORY_SHARE * gib * 2**30)) for index in range(num_gpus)]
            node += 1
    return tuple(gpus)


def _nodes(part: str) -> Iterator[tuple[int, float]]:
    """Yields (number of GPUs, GiB of each) per node."""
    matches = (re.fullmatch(form, part, re.IGNORECASE) for form in _NODES)
    match = next((match for match in matches if match), None)
    if match is None or not float(match[3]):
        raise ValueError(f"GPUs are written as 2x16GiB, or as 2x(4x24GiB) for two nodes of four; got {part!r}")
    for _ in range(int(match[1] or 1)):
        yield int(match[2] or 1), float(match[3])
