"""The GPUs that a plan may use: how many, how large, on which nodes.

"2x16GiB"                  two GPUs of 16 GiB on one node
"2x(4x24GiB)"              two nodes of four GPUs of 24 GiB
"1x(8x80GiB)+2x(4x24GiB)"  one node of eight large ones, two of four small ones
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

VISIBLE = 0.98
"""Of the memory that `nvidia-smi` shows, what a process can have; the driver keeps the rest. Users' torch tells of
15.70 GiB on an RTX 4080 of 16, of 23.65 on an RTX 4090 of 24, of 79.1 on an A100 of 80."""
_GPUS = r"(\d+)x(\d+(?:\.\d+)?)GiB"
_NODES = rf"(?:(\d+)x\({_GPUS}\)|{_GPUS})"


@dataclass(frozen=True)
class Gpu:
    """One GPU."""

    node: int
    index: int
    """On its node, from 0."""
    memory_bytes: int
    """That processes can have."""

    def __str__(self) -> str:
        return f"node {self.node} GPU {self.index}"


def parse_gpus(text: str) -> tuple[Gpu, ...]:
    """The GPUs in node order. Give the memory that `nvidia-smi` shows: cards with ECC show less than what is sold.

    Raises ValueError if text is not of the form above.
    """
    gpus: list[Gpu] = []
    node = 0
    for part in text.replace(" ", "").split("+"):
        for num_gpus, gib in _nodes(part):
            gpus += [Gpu(node, index, int(VISIBLE * gib * 2**30)) for index in range(num_gpus)]
            node += 1
    return tuple(gpus)


def _nodes(part: str) -> Iterator[tuple[int, float]]:
    """(GPUs, GiB of each) per node."""
    match = re.fullmatch(_NODES, part)
    if match is None:
        raise ValueError(f"{part!r} are no GPUs: write 2x16GiB, or 2x(4x24GiB) for two nodes of four")
    nodes, num_gpus, gib, plain_num_gpus, plain_gib = match.groups()
    for _ in range(int(nodes or 1)):
        yield int(num_gpus or plain_num_gpus), float(gib or plain_gib)
