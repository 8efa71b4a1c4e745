"""Tests of which stage may grow and which gives way, on imaginary clusters."""

from collections.abc import Mapping
from typing import Any

import pytest

from cluster.machines.nodes import Node
from cluster.scaling import free_resources
from cluster.scaling.free_resources import (
    LASTING_S,
    NODE_S,
    SCATTERED_S,
    Claim,
    ClusterSnapshot,
    FreeResources,
    Watch,
)
from cluster.scaling.stage_uses import REFUSED_S, RELEASE_S, Key, StageUse, StageUses

ENCODE, DENOISE = ("relay", "Encoder"), ("relay", "Transformer")
GPU = {"GPU": 1.0}


def nodes(*free_gpus: float, labels: Mapping[str, str] | None = None) -> tuple[Any, ...]:
    return tuple((Node(8.0, labels or {}), {"GPU": free, "CPU": 8.0}) for free in free_gpus)


class Stages:
    """Two stages that share a cluster. Targets apply at once, and new replicas are ready at once."""

    def __init__(self, *, encode_s: float = 0.25, num_shards: int = 1, is_auto: bool = True) -> None:
        self.uses = StageUses()
        self.stages: dict[Key, StageUse] = {
            ENCODE: StageUse(Claim(GPU), encode_s, is_auto),
            DENOISE: StageUse(Claim(GPU, num_shards), 25.0, is_auto),
        }
        for key, use in self.stages.items():
            self.uses.join(key, use, [GPU])
        self.now_s = 0.0
        self.say({ENCODE: 1, DENOISE: 1})

    def say(self, targets: Mapping[Key, int], ready: Mapping[Key, int] | None = None) -> None:
        self.now_s += 100.0
        for key, target in targets.items():
            use = self.stages[key]
            use.note(self.now_s, target, (ready or targets)[key], 1)
            use.asked.clear()  # as if asked long ago

    def grant(self, snapshot: ClusterSnapshot, **wanted: int) -> dict[str, int]:
        for key, number in zip((ENCODE, DENOISE), wanted.values(), strict=True):
            self.stages[key].num_wanted = number
        return dict(
            zip(wanted, (self.uses.grant(key, snapshot, self.now_s) for key in (ENCODE, DENOISE)), strict=True)
        )

    def giver(self, *waiting: Mapping[str, float]) -> str | None:
        return next((key[1] for key in self.stages if self.uses.gives_way(key, waiting, self.now_s)), None)


def test_no_stage_takes_room_that_a_slower_one_wants() -> None:
    assert Stages().grant(ClusterSnapshot(nodes(2, 2)), encode=5, denoise=5) == {"encode": 1, "denoise": 5}


def test_what_the_slower_one_does_not_want_the_other_gets() -> None:
    assert Stages().grant(ClusterSnapshot(nodes(2, 2)), encode=5, denoise=2) == {"encode": 4, "denoise": 2}


def test_nothing_is_asked_for_that_could_not_be_placed() -> None:
    assert Stages(num_shards=3).grant(ClusterSnapshot(nodes(2, 2)), encode=1, denoise=9)["denoise"] == 2
    assert Stages(num_shards=5).grant(ClusterSnapshot(nodes(2, 2)), encode=1, denoise=9)["denoise"] == 1


def test_a_label_keeps_a_stage_from_nodes() -> None:
    free = FreeResources(nodes(4, labels={"zone": "a"}))
    assert free.take(Claim(GPU, 1, {"zone": "a"}))
    assert not free.take(Claim(GPU, 1, {"zone": "b"}))


def test_a_group_lies_on_one_node_where_one_has_room() -> None:
    free = FreeResources(nodes(1, 2))
    assert free.take(Claim(GPU, 2))
    assert free.take(Claim(GPU, 1))
    assert not free.take(Claim(GPU, 1))


def test_the_room_of_what_waits_is_not_given_away() -> None:
    assert Stages().grant(ClusterSnapshot(nodes(2), (GPU,)), encode=1, denoise=9)["denoise"] == 2


def test_what_was_asked_for_just_now_is_not_given_away_twice() -> None:
    stages = Stages()
    stages.stages[DENOISE].note(stages.now_s, 3, 1, 1)  # two more, which the snapshot does not show yet
    assert stages.grant(ClusterSnapshot(nodes(3)), encode=1, denoise=9)["denoise"] == 4


def test_a_stage_with_a_bound_of_its_own_has_no_other() -> None:
    assert Stages(is_auto=False).grant(ClusterSnapshot(nodes(0)), encode=3, denoise=4) == {
        "encode": 3,
        "denoise": 4,
    }


def test_where_nodes_come_on_demand_what_finds_no_place_asks_for_them() -> None:
    growing, fixed = ClusterSnapshot(nodes(0), has_autoscaler=True), ClusterSnapshot(nodes(0))
    assert Stages().grant(growing, encode=1, denoise=4)["denoise"] == 4
    assert Stages().grant(fixed, encode=1, denoise=4)["denoise"] == 1


def test_the_stage_that_has_most_to_spare_gives_way_to_what_waits() -> None:
    stages = Stages()
    stages.say({ENCODE: 2, DENOISE: 3})
    assert stages.giver(GPU) == "Encoder"
    assert stages.giver(GPU) is None  # the first replica's room must become free first
    stages.say({ENCODE: 1, DENOISE: 3})
    assert stages.giver(GPU) == "Transformer"
    stages.say({ENCODE: 1, DENOISE: 1})
    assert stages.giver(GPU) is None


def test_nobody_gives_way_to_what_is_not_of_this_app() -> None:
    stages = Stages()
    stages.say({ENCODE: 2, DENOISE: 3})
    assert stages.giver({"GPU": 8.0}) is None


def test_who_found_no_place_where_there_seemed_to_be_one_does_not_ask_again_at_once() -> None:
    stages = Stages()
    stages.say({ENCODE: 1, DENOISE: 2}, ready={ENCODE: 1, DENOISE: 1})
    assert stages.giver(GPU) == "Transformer"
    use = stages.stages[DENOISE]
    for after_s, number in ((RELEASE_S, 1), (REFUSED_S, 2)):
        use.note(stages.now_s + after_s, 1, 1, 1)
        use.num_wanted = 2
        assert stages.uses.grant(DENOISE, ClusterSnapshot(nodes(1)), stages.now_s + after_s) == number


@pytest.mark.parametrize(("encode_s", "giver"), [(0.25, "Encoder"), (25.0, None)])
def test_a_stage_that_is_much_faster_gives_way_to_a_slower_one_without_room(
    encode_s: float, giver: str | None
) -> None:
    stages = Stages(encode_s=encode_s)
    stages.say({ENCODE: 2, DENOISE: 2})
    stages.grant(ClusterSnapshot(nodes(0)), encode=2, denoise=3)
    assert stages.giver() == giver


@pytest.mark.parametrize(
    ("snapshot", "stuck_after_s"),
    [
        (ClusterSnapshot(nodes(0), (GPU,)), 2 * LASTING_S),
        (ClusterSnapshot(nodes(1), (GPU,)), SCATTERED_S),
        (ClusterSnapshot((), (GPU,), True), NODE_S),
    ],
    ids=["no room", "room that is scattered", "nodes that come"],
)
def test_how_long_something_waits_before_others_give_way(
    snapshot: ClusterSnapshot, stuck_after_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 100.0
    monkeypatch.setattr(free_resources, "read_snapshot", lambda: snapshot)
    monkeypatch.setattr(free_resources.time, "monotonic", lambda: now_s)
    watch = Watch()
    watch.snapshot()
    now_s += stuck_after_s - 0.1
    assert watch.stuck() == []
    now_s += 0.2
    assert watch.stuck() == [GPU]
