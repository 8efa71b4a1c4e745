"""Assigns consecutive blocks to shards so that the slowest (or fullest) shard has as little as possible."""

import math
from collections.abc import Sequence
from itertools import accumulate

Plan = tuple[tuple[float, ...], tuple[int, ...]]
"""Shard loads, heaviest first, and the cuts that cause them. The smaller of two plans is the better one."""


def plan_cuts(costs: Sequence[float], num_shards: int, *, tail_cost: float = 0.0) -> tuple[int, ...]:
    """Returns the `num_shards + 1` cuts `(0, ..., len(costs))`: shard `rank` has blocks `cuts[rank]:cuts[rank +
    1]`.

    Optimal: minimises the load of the heaviest shard, then of the second heaviest, and so on; in a tie the earlier
    ranks get less, because rank 0 also has the step queue. `pairwise(cuts)` gives the block ranges.

    What every shard holds (the embedders) is the same for all plans and is left out of `costs`.

    Args:
        costs: one number per block, in forward order: bytes or seconds, all of one unit.
        num_shards: how many shards; each gets at least one block.
        tail_cost: cost of what only the last shard has besides its blocks, in the unit of `costs`.

    Raises:
        ValueError: no plan exists, or a cost is negative or not finite.
    """
    _check(costs, num_shards, tail_cost)
    num_blocks = len(costs)
    if num_shards == 1:
        return 0, num_blocks
    sums = [0, *accumulate(costs)]
    best: dict[int, Plan] = {end: ((sums[end],), (0, end)) for end in range(1, num_blocks + 1)}
    for _ in range(num_shards - 2):
        best = {end: _best_plan(best, sums, end) for end in range(min(best) + 1, num_blocks + 1)}
    return _best_plan(best, sums, num_blocks, tail_cost)[1]


def _best_plan(best: dict[int, Plan], sums: Sequence[float], end: int, extra: float = 0.0) -> Plan:
    """Adds one shard that ends at `end` to the best plan of each shorter prefix, and returns the best result.

    Adding the same load to two plans does not change which is smaller, so only best prefixes matter.
    """
    return min(_extend(best[start], sums[end] - sums[start] + extra, end) for start in best if start < end)


def _extend(plan: Plan, load: float, end: int) -> Plan:
    loads, cuts = plan
    return tuple(sorted((*loads, load), reverse=True)), (*cuts, end)


def _check(costs: Sequence[float], num_shards: int, tail_cost: float) -> None:
    if num_shards < 1:
        raise ValueError(f"num_shards is {num_shards}; it must be at least 1")
    if num_shards > len(costs):
        raise ValueError(
            f"{len(costs)} blocks cannot fill {num_shards} shards, because each needs at least one block; "
            f"set num_shards to {len(costs)} or less"
        )
    for name, cost in [*((f"costs[{i}]", cost) for i, cost in enumerate(costs)), ("tail_cost", tail_cost)]:
        if not math.isfinite(cost) or cost < 0:
            raise ValueError(f"{name} is {cost}; a cost must be finite and not negative: measure it again")
