"""The placement of processes on GPUs."""

from cluster.machines.inventory import parse_gpus
from deployments.memory.limit import OVERHEAD_BYTES
from deployments.plan.place import Placement, StageDemand, blocked_by_order, plan_placement
from deployments.plan.sizes import RankSizes

GIB = 2**30


def rank(need_gib: float, *, shares_time: bool = False) -> RankSizes:
    """Returns a rank that needs need_gib of its GPU in all."""
    return RankSizes(0, int(need_gib * GIB) - OVERHEAD_BYTES, 0, shares_time=shares_time)


def where(placement: Placement, stage: str) -> list[tuple[int, int]]:
    return [
        (gpu.node, gpu.index) for process in placement.processes if process.stage == stage for gpu in process.gpus
    ]


def test_small_stages_fill_the_gaps_beside_shards() -> None:
    demands = {
        "encode": StageDemand((rank(3),), 0.2),
        "denoise": StageDemand((rank(12), rank(12)), 0.8),
        "decode": StageDemand((rank(3),), 0.2),
    }
    placement = plan_placement(demands, parse_gpus("2x16GiB"))
    assert where(placement, "denoise") == [(0, 0), (0, 1)]
    assert where(placement, "encode") != where(placement, "decode")
    assert not placement.shortfalls()


def test_a_group_goes_to_one_node_if_one_has_room() -> None:
    demands = {"encode": StageDemand((rank(20),), 1.0), "denoise": StageDemand((rank(20),) * 2, 0.9)}
    placement = plan_placement(demands, parse_gpus("2x(2x24GiB)"))
    assert where(placement, "encode") == [(0, 0)]
    assert where(placement, "denoise") == [(1, 0), (1, 1)]
    assert not placement.split_groups()


def test_a_group_that_no_node_holds_is_spread_and_told() -> None:
    placement = plan_placement({"denoise": StageDemand((rank(20),) * 4, 0.9)}, parse_gpus("2x(2x24GiB)"))
    assert where(placement, "denoise") == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert placement.split_groups() == [0]


def test_a_share_that_is_too_small_says_by_how_much() -> None:
    [shortfall] = plan_placement({"denoise": StageDemand((rank(12),), 0.5)}, parse_gpus("1x16GiB")).shortfalls()
    assert shortfall == (
        "denoise 0 rank 0 needs 12.00 GiB on node 0 GPU 0, but its share, 0.5 GPU of 15.68 GiB, is 7.84 GiB: "
        "4.16 GiB too little; give it num_gpus 0.766"
    )


def test_what_finds_no_gpu_is_told() -> None:
    demands = {"denoise": StageDemand((rank(12),) * 2, 0.8), "encode": StageDemand((rank(6),), 0.4)}
    [shortfall] = plan_placement(demands, parse_gpus("2x16GiB")).shortfalls()
    assert shortfall == "encode 0 has no place: no GPU has 0.4 GPU left (it needs 6.00 GiB)"


def test_replicas_grow_to_their_most_while_there_is_room() -> None:
    demands = {"denoise": StageDemand((rank(12),), 0.8, 1, 9), "encode": StageDemand((rank(2),), 0.2, 2, 2)}
    placement = plan_placement(demands, parse_gpus("3x16GiB"))
    assert (placement.num_replicas("denoise"), placement.num_replicas("encode")) == (3, 2)


def test_several_whole_gpus_share_the_weights() -> None:
    placement = plan_placement({"denoise": StageDemand((RankSizes(0, 20 * GIB, GIB),), 2)}, parse_gpus("2x16GiB"))
    assert [placement.used_bytes(gpu) for gpu in placement.gpus] == [11 * GIB + OVERHEAD_BYTES] * 2


def test_of_those_that_take_turns_only_the_largest_counts() -> None:
    demands = {
        "denoise": StageDemand((rank(12, shares_time=True),), 0.5),
        "encode": StageDemand((rank(10, shares_time=True),), 0.5),
    }
    placement = plan_placement(demands, parse_gpus("1x16GiB"))
    assert placement.used_bytes(placement.gpus[0]) == 12 * GIB + OVERHEAD_BYTES
    assert not placement.shortfalls()


def test_a_stage_without_gpus_stays_on_the_cpu() -> None:
    placement = plan_placement({"encode": StageDemand((rank(12),), 0)}, parse_gpus("1x16GiB"))
    assert where(placement, "encode") == []
    assert not placement.shortfalls()


def test_small_stages_that_come_first_can_block_a_group() -> None:
    group = StageDemand((rank(12), rank(12)), 0.8)
    gpus = parse_gpus("2x16GiB")
    small = {"encode": StageDemand((rank(3),), 0.2), "denoise": group, "decode": StageDemand((rank(3),), 0.2)}
    assert blocked_by_order(small, gpus) == ("encode", "decode", "denoise")
    smaller = {"encode": StageDemand((rank(1),), 0.1), "denoise": group, "decode": StageDemand((rank(1),), 0.1)}
    assert blocked_by_order(smaller, gpus) is None


def test_shards_of_half_a_gpu_may_meet_on_one() -> None:
    demands = {"denoise": StageDemand((rank(6), rank(6)), 0.5)}
    assert plan_placement(demands, parse_gpus("2x16GiB")).crowded_groups() == [0]
