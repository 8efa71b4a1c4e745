"""Tests which model leaves, and when, for given reports; in serve_app/test_swapping.py the reports come from
Serve."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from cluster.scaling import free_resources, sleeping, stage_uses
from cluster.scaling.sleeping import SleepPolicy

STAGES = ["Encoder", "Transformer"]
DELAY_S = 60.0
TICK_S = 0.5
GROWTH: dict[str, Any] = {
    "resources": {"GPU": 1.0},
    "num_ranks": 1,
    "labels": {},
    "shapes": [{"GPU": 1.0}],
    "request_s": 10.0,
    "is_auto": False,
    "reports_load": False,
    "downscale_delay_s": DELAY_S,
}


class Controller:
    """Calls the policies of some models, and applies their decisions."""

    def __init__(self, *models: str) -> None:
        self.now_s = 100.0
        self.policies = {
            (model, stage): SleepPolicy(model, STAGES, GROWTH) for model in models for stage in STAGES
        }
        self.replicas = dict.fromkeys(self.policies, 1)
        self.requests = dict.fromkeys(self.policies, 0)
        self.coming: set[tuple[str, str]] = set()
        """Stages with requests and no replica yet, whose policies Serve does not call."""

    def run(self, seconds: float) -> None:
        for _ in range(int(seconds / TICK_S)):
            self.now_s += TICK_S
            for key in self.policies.keys() - self.coming:
                self.replicas[key] = int(self.policies[key](self._context(*key))[0])

    def use(self, model: str) -> None:
        for stage in STAGES:
            self.requests[model, stage] = 1
        self.run(TICK_S)
        for stage in STAGES:
            self.requests[model, stage] = 0

    def awake(self) -> set[str]:
        return {model for (model, _), number in self.replicas.items() if number}

    def _context(self, model: str, stage: str) -> AutoscalingContext:
        unused: Any = None
        number = self.replicas[model, stage]
        return AutoscalingContext(
            deployment_id=unused,
            deployment_name=stage,
            app_name="relay",
            current_num_replicas=number,
            target_num_replicas=number,
            running_replicas=[],
            total_num_requests=self.requests[model, stage],
            total_queued_requests=0,
            aggregated_metrics={},
            raw_metrics={},
            capacity_adjusted_min_replicas=0,
            capacity_adjusted_max_replicas=4,
            policy_state={},
            last_scale_up_time=None,
            last_scale_down_time=None,
            current_time=self.now_s,
            config=AutoscalingConfig(target_ongoing_requests=1),
        )


@pytest.fixture
def unplaced(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Names of the resources that processes wait for."""
    wanted: set[str] = set()
    monkeypatch.setattr(free_resources.watch, "lacking", lambda: frozenset(wanted))
    monkeypatch.setattr(stage_uses.shared, "released_s", -math.inf)
    yield wanted
    sleeping._models.clear()


def test_a_model_sleeps_once_nobody_has_asked_for_its_delay(unplaced: set[str]) -> None:
    controller = Controller("a")
    controller.use("a")
    controller.run(DELAY_S - 2 * TICK_S)
    assert controller.awake() == {"a"}
    controller.run(3 * TICK_S)
    assert controller.awake() == set()


def test_the_least_recently_used_idle_model_makes_room_at_once(unplaced: set[str]) -> None:
    controller = Controller("a", "b", "c")
    for model in ("b", "c", "a"):
        controller.use(model)
    controller.run(5)
    unplaced.add("GPU")
    controller.run(2 * TICK_S)
    assert controller.awake() == {"a", "c"}


def test_nobody_makes_room_that_does_not_have_what_is_wanted(unplaced: set[str]) -> None:
    controller = Controller("a")
    controller.use("a")
    unplaced.add("CPU")
    controller.run(DELAY_S / 2)
    assert controller.awake() == {"a"}


def test_a_model_in_use_makes_no_room_not_even_with_a_stage_that_is_idle(unplaced: set[str]) -> None:
    controller = Controller("a")
    unplaced.add("GPU")
    controller.requests["a", "Transformer"] = 1
    controller.run(2 * DELAY_S)
    assert set(controller.replicas.values()) == {1}


def test_a_model_that_is_coming_makes_no_room_for_its_own_stages(unplaced: set[str]) -> None:
    controller = Controller("a")
    controller.replicas["a", "Transformer"] = 0
    controller.coming.add(("a", "Transformer"))
    unplaced.add("GPU")
    controller.run(2 * DELAY_S)
    assert controller.replicas["a", "Encoder"] == 1


def test_a_stage_shrinks_after_its_delay_while_its_model_is_used(unplaced: set[str]) -> None:
    controller = Controller("a")
    controller.requests["a", "Transformer"] = 3
    controller.run(TICK_S)
    assert controller.replicas["a", "Transformer"] == 3
    controller.requests["a", "Transformer"] = 1
    controller.run(DELAY_S - 2 * TICK_S)
    assert controller.replicas["a", "Transformer"] == 3
    controller.run(3 * TICK_S)
    assert controller.replicas["a", "Transformer"] == 1
