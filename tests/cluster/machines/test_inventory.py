"""Tests of parsing GPUs as users write them."""

import pytest

from cluster.machines.inventory import USABLE_MEMORY_SHARE, Gpu, parse_gpus

GIB = 2**30


@pytest.mark.parametrize(
    ("text", "gpus"),
    [
        ("2x16GiB", [(0, 0, 16), (0, 1, 16)]),
        ("2x(1x24GiB)", [(0, 0, 24), (1, 0, 24)]),
        ("1x(1x80GiB) + 1x22.5GiB", [(0, 0, 80), (1, 0, 22.5)]),
        ("2x16GB", [(0, 0, 16), (0, 1, 16)]),
        ("1x16+24g", [(0, 0, 16), (1, 0, 24)]),
        ("16GiB", [(0, 0, 16)]),
        ("1x(2x24)", [(0, 0, 24), (0, 1, 24)]),
    ],
)
def test_every_gpu_has_its_node_and_memory(text: str, gpus: list[tuple[int, int, float]]) -> None:
    assert parse_gpus(text) == tuple(
        Gpu(node, index, int(USABLE_MEMORY_SHARE * gib * GIB)) for node, index, gib in gpus
    )


@pytest.mark.parametrize(
    "text", ["", "two", "2", "2x16MiB", "2x(2x16GiB", "x16GiB", "0x16GiB", "2x0GiB", "0x(1x8GiB)"]
)
def test_anything_else_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="written as 2x16GiB"):
        parse_gpus(text)
