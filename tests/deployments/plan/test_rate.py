"""The upper bound on throughput."""

from dataclasses import replace

import pytest

from cluster.machines.inventory import parse_gpus
from deployments.plan.place import StageDemand, plan_placement
from deployments.plan.profile import DenoiserTimes, Profile, Times, read_profile, write_profile
from deployments.plan.rate import bound_rate
from deployments.plan.sizes import RankSizes
from deployments.request import MediaSize

DENOISER = DenoiserTimes(head_s=0.01, blocks_s=(0.1, 0.1, 0.1, 0.2), tail_s=0.04, num_forwards=10)
TIMES = Times(encode_s=0.1, denoisers={"transformer": DENOISER}, decode_s=0.2)


def rank(*blocks: int) -> RankSizes:
    return RankSizes(0, 0, 0, ((blocks[0], blocks[1]),) if blocks else None)


def test_the_slowest_shard_bounds_a_pipeline_and_every_rank_computes_the_head() -> None:
    demands = {
        "encode": StageDemand((rank(),), 0.1),
        "denoise": StageDemand((rank(0, 2), rank(2, 4)), 0.8),
        "decode": StageDemand((rank(),), 0.1),
    }
    placement = plan_placement(demands, parse_gpus("2x16GiB"))
    rate = bound_rate(placement, TIMES)
    assert rate.stage_s["denoise"] == pytest.approx(10 * (0.01 + 0.3 + 0.04))
    assert rate.stage_bounds["encode"] == pytest.approx(10)
    # both small stages share a GPU with the first rank: 0.3 + 2.1 s, less than the last rank's 3.5 s
    assert rate.bound == pytest.approx(1 / 3.5)
    assert sorted(rate.gpu_use.values()) == pytest.approx([(2.1 + 0.3) / 3.5, 1])


def test_a_gpu_that_all_share_bounds_them_together() -> None:
    demands = {
        "encode": StageDemand((rank(),), 0.1),
        "denoise": StageDemand((rank(0, 4),), 0.8),
        "decode": StageDemand((rank(),), 0.1),
    }
    rate = bound_rate(plan_placement(demands, parse_gpus("1x16GiB")), TIMES)
    assert rate.bound == pytest.approx(1 / (0.1 + 10 * 0.55 + 0.2))
    assert min(rate.stage_bounds.values()) > rate.bound


def test_replicas_add_up() -> None:
    demands = {
        "encode": StageDemand((rank(),), 0.0),
        "denoise": StageDemand((rank(0, 4),), 1.0, 3, 3),
        "decode": StageDemand((rank(),), 0.0),
    }
    rate = bound_rate(plan_placement(demands, parse_gpus("3x16GiB")), TIMES)
    assert rate.bound == pytest.approx(3 / 5.5)


def test_the_times_of_several_denoisers_add_up_and_one_cut_is_for_all() -> None:
    first = DenoiserTimes(head_s=0.0, blocks_s=(0.3, 0.1, 0.1), tail_s=0.0, num_forwards=2)
    second = DenoiserTimes(head_s=0.0, blocks_s=(0.1, 0.1, 0.1), tail_s=0.1, num_forwards=10)
    times = Times(encode_s=0.1, denoisers={"transformer": first, "transformer_2": second}, decode_s=0.1)
    assert times.rank_s(((0, 1), (0, 1))) == pytest.approx(2 * 0.3 + 10 * 0.1)
    assert times.rank_s(None) == pytest.approx(2 * 0.5 + 10 * 0.4)
    assert times.plan_cuts(2) == (0, 2, 3)
    shorter = replace(first, blocks_s=(0.3, 0.1))
    assert replace(times, denoisers={"transformer": shorter, "transformer_2": second}).plan_cuts(2) is None


def test_a_profile_comes_back_as_it_was_written(tmp_path) -> None:
    profile = Profile({"processor": "x"}, "tiny://flux", {"64x64": TIMES})
    write_profile(profile, tmp_path / "profile.json")
    assert read_profile(tmp_path / "profile.json") == profile
    with pytest.raises(KeyError, match="no times for 128x128 in the profile; it has 64x64"):
        profile.at(MediaSize(128, 128))


def test_another_file_is_no_profile(tmp_path) -> None:
    (tmp_path / "x.json").write_text('{"machine": {}}')
    with pytest.raises(ValueError, match=r"x\.json is not a profile.*relay profile"):
        read_profile(tmp_path / "x.json")
