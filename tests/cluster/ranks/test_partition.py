"""Tests of assigning blocks to shards."""

import math
import random
from collections.abc import Sequence
from itertools import combinations, pairwise

import pytest

from cluster.ranks.partition import plan_cuts


def loads_of(costs: Sequence[float], cuts: Sequence[int], tail_cost: float = 0) -> list[float]:
    """Returns the shard loads, heaviest first."""
    loads = [sum(costs[start:end]) for start, end in pairwise(cuts)]
    loads[-1] += tail_cost
    return sorted(loads, reverse=True)


def all_cuts(num_blocks: int, num_shards: int) -> list[tuple[int, ...]]:
    return [(0, *inner, num_blocks) for inner in combinations(range(1, num_blocks), num_shards - 1)]


def test_partition_never_splits_a_block() -> None:
    cuts = plan_cuts([1, 100, 1, 1], 3)
    assert cuts == (0, 1, 2, 4)


@pytest.mark.parametrize("num_shards", [1, 2, 5, 7])
def test_every_shard_gets_a_block_and_every_block_a_shard(num_shards: int) -> None:
    cuts = plan_cuts([0, 0, 9, 0, 0, 0, 0], num_shards)
    assert len(cuts) == num_shards + 1
    assert (cuts[0], cuts[-1]) == (0, 7)
    assert all(start < end for start, end in pairwise(cuts))


def test_no_other_plan_is_better() -> None:
    chance = random.Random(0)
    for _ in range(300):
        costs = [chance.randint(0, 9) for _ in range(chance.randint(1, 9))]
        num_shards, tail_cost = chance.randint(1, len(costs)), chance.choice([0, 0, 5])
        candidates = [loads_of(costs, cuts, tail_cost) for cuts in all_cuts(len(costs), num_shards)]
        cuts = plan_cuts(costs, num_shards, tail_cost=tail_cost)
        assert loads_of(costs, cuts, tail_cost) == min(candidates), (costs, num_shards, tail_cost)


def test_below_the_bottleneck_the_rest_is_even_too() -> None:
    costs = [10, 1, 1, 1, 1, 1, 1]
    assert loads_of(costs, plan_cuts(costs, 3)) == [10, 3, 3]


def test_in_a_tie_the_first_rank_gets_less() -> None:
    assert plan_cuts([1] * 5, 2) == (0, 2, 5)


def test_a_heavy_tail_leaves_the_last_shard_fewer_blocks() -> None:
    assert plan_cuts([1] * 6, 2) == (0, 3, 6)
    assert plan_cuts([1] * 6, 2, tail_cost=4) == (0, 5, 6)


def test_flux_over_four_gpus_is_within_one_block_of_ideal() -> None:
    """19 double blocks of 0.63 GiB and 38 single blocks of 0.26 GiB."""
    costs = [0.63] * 19 + [0.26] * 38
    heaviest = loads_of(costs, plan_cuts(costs, 4))[0]
    assert heaviest < sum(costs) / 4 + max(costs) / 2


@pytest.mark.parametrize(
    ("costs", "num_shards", "message"),
    [
        ([1, 1], 3, "2 blocks cannot fill 3 shards.*set num_shards to 2 or less"),
        ([1, 1], 0, "num_shards is 0; it must be at least 1"),
        ([1, -1], 1, r"costs\[1\] is -1; a cost must be finite"),
        ([math.nan, 1], 2, r"costs\[0\] is nan"),
    ],
)
def test_an_impossible_plan_is_refused_in_words(costs: list[float], num_shards: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_cuts(costs, num_shards)


def test_a_negative_tail_is_refused() -> None:
    with pytest.raises(ValueError, match="tail_cost is -1"):
        plan_cuts([1, 1], 2, tail_cost=-1)
