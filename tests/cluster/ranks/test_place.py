"""Tests of which ranks are on which ring."""

import pytest

from cluster.ranks.place import Rendezvous


@pytest.mark.parametrize(
    ("num_ranks", "degree", "rings"),
    [
        (3, 1, [(0, 1, 2)]),
        (2, 2, [(0,), (0, 1)]),
        (4, 2, [(0, 2), (0, 1, 3)]),
        (6, 3, [(0, 3), (0, 1, 4), (0, 2, 5)]),
    ],
)
def test_every_rank_is_on_one_ring_and_rank_0_on_all(
    num_ranks: int, degree: int, rings: list[tuple[int, ...]]
) -> None:
    rendezvous = Rendezvous(num_ranks, "gloo", degree=degree)
    assert [rendezvous.ring_of(i) for i in range(degree)] == rings
