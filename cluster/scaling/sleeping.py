"""Decides when the stages of a model that may sleep do so: all together, and early if another model needs the
room.

Serve wakes a stage at its first request, and Ray places its replicas as soon as there is room. This module decides
which model makes room: the least recently used one of those that are idle.
"""

from collections.abc import Collection, Mapping
from typing import Any

from ray.serve.config import AutoscalingContext

from cluster.scaling import free_resources, stage_uses
from cluster.scaling.autoscaling import GrowPolicy
from cluster.scaling.stage_uses import RELEASE_S

IDLE_S = 2.0
"""A model without a request for this long is idle: Serve learns of requests about a second late."""
HEARD_S = 1.5
"""Serve calls a stage's policy several times a second, unless the stage has no replica but has requests."""


class ModelUse:
    """What Serve has reported about those stages of one model that may sleep."""

    def __init__(self, now_s: float, stages: Collection[str]) -> None:
        self._used_s = now_s
        self._heard_s = dict.fromkeys(stages, now_s)
        self._running: set[str] = set()
        self.resources: set[str] = set()
        """Names of the resources that its stages take."""
        self.is_leaving = False

    def note(self, stage: str, now_s: float, *, has_requests: bool, is_running: bool) -> None:
        """Records the state of a stage. A stage that has just started counts as used, because a request started
        it."""
        self._heard_s[stage] = now_s
        has_come = is_running and stage not in self._running
        (self._running.add if is_running else self._running.discard)(stage)
        if has_requests or has_come:
            self._used_s, self.is_leaving = now_s, False

    def idle_s(self, now_s: float) -> float:
        """Returns for how long nobody has used the model. A stage whose policy is not called is starting for a
        request."""
        is_coming = any(now_s - heard_s > HEARD_S for heard_s in self._heard_s.values())
        return 0.0 if is_coming else now_s - self._used_s

    def is_awake(self) -> bool:
        """Whether all stages run. A model that is still starting must not leave."""
        return self._running == self._heard_s.keys()


_models: dict[tuple[str | None, str], ModelUse] = {}
"""By application and model name: all models that this process, Serve's controller, decides about."""


class SleepPolicy:
    """The policy of a stage that may have no replica. Serve calls it several times a second."""

    def __init__(self, model: str, stages: list[str], growth: Mapping[str, Any]) -> None:
        """
        Args:
            model: name of the model that the stage belongs to.
            stages: deployments of all stages of that model that may sleep.
            growth: arguments of the policy while the model is awake; its downscale delay is also the delay before
                the model sleeps.
        """
        self._model, self._stages = model, stages
        self._resources, self._delay_s = growth["resources"], growth["downscale_delay_s"]
        self._grow = GrowPolicy(**growth)

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        now_s, stage = float(context.current_time or 0.0), context.deployment_name
        use = _models.setdefault((context.app_name, self._model), ModelUse(now_s, {*self._stages, stage}))
        use.resources.update(self._resources)
        has_requests, is_running = context.total_num_requests > 0, context.current_num_replicas > 0
        use.note(stage, now_s, has_requests=has_requests, is_running=is_running)
        if self._leaves(use, now_s):
            return 0.0, {}
        fewest = min(1.0, context.target_num_replicas)  # no stage sleeps before the others do
        return max(fewest, self._grow(context)[0]), {}

    def _leaves(self, use: ModelUse, now_s: float) -> bool:
        if use.idle_s(now_s) >= max(IDLE_S, self._delay_s):
            use.is_leaving = True
        elif not use.is_leaving and use is _least_recently_used(now_s) and not _is_room_being_made(now_s):
            use.is_leaving = not free_resources.watch.lacking().isdisjoint(use.resources)
            stage_uses.shared.released_s = now_s if use.is_leaving else stage_uses.shared.released_s
        return use.is_leaving


def _is_room_being_made(now_s: float) -> bool:
    return now_s - stage_uses.shared.released_s < RELEASE_S


def _least_recently_used(now_s: float) -> ModelUse | None:
    """Returns the least recently used of the models that are awake and idle."""
    idle = [use for use in _models.values() if use.is_awake() and use.idle_s(now_s) >= IDLE_S]
    return max(idle, key=lambda use: use.idle_s(now_s), default=None)
