"""When the stages of a model that may sleep go to sleep: all together, and early where another needs the room.

Serve wakes a stage at its first request, and Ray places what it starts as soon as there is room. What is left is
who makes room: of the models that nobody uses, the one that was used least recently.
"""

import math
from collections.abc import Callable, Collection
from typing import Any

from ray.serve.autoscaling_policy import replica_queue_length_autoscaling_policy
from ray.serve.config import AutoscalingContext

from cluster.autoscaling import load_policy
from cluster.unplaced import Unplaced

IDLE_S = 2.0
"""Without a request for so long, a model is idle: Serve hears of requests about a second late."""
HEARD_S = 1.5
"""Serve asks about a stage several times a second, unless it is without a replica and has requests."""

ROOM_S = 5.0
"""What leaves takes a moment to go, and what waits for its room to be placed: no other leaves meanwhile."""

Count = Callable[[AutoscalingContext], tuple[float, dict[str, Any]]]


class ModelUse:
    """What Serve tells of the stages of one model that may sleep."""

    def __init__(self, now_s: float, stages: Collection[str]) -> None:
        self._used_s = now_s
        self._heard_s = dict.fromkeys(stages, now_s)
        self._running: set[str] = set()
        self.resources: set[str] = set()
        """Names of what its stages take."""
        self.is_leaving = False
        self.made_room_s = -math.inf
        """When it left because another needed the room."""

    def note(self, stage: str, now_s: float, *, has_requests: bool, is_running: bool) -> None:
        """Of a stage. One that has just come counts as used: it has come for somebody."""
        self._heard_s[stage] = now_s
        has_come = is_running and stage not in self._running
        (self._running.add if is_running else self._running.discard)(stage)
        if has_requests or has_come:
            self._used_s, self.is_leaving = now_s, False

    def idle_s(self, now_s: float) -> float:
        """For how long nobody has used it. A stage of which nothing is heard is coming for somebody."""
        is_coming = any(now_s - heard_s > HEARD_S for heard_s in self._heard_s.values())
        return 0.0 if is_coming else now_s - self._used_s

    def is_awake(self) -> bool:
        """All of it: one that is coming is not to leave."""
        return self._running == self._heard_s.keys()


_models: dict[tuple[str | None, str], ModelUse] = {}
"""By application and name: all that this process, Serve's controller, decides about."""
_unplaced = Unplaced()


class SleepPolicy:
    """How many replicas a stage should have that may have none. Serve calls it several times a second.

    Serve's own delays before a stage shrinks must be 0: they are kept here, for one that makes room has none.
    """

    def __init__(
        self, model: str, stages: list[str], resources: list[str], reports_load: bool, downscale_delay_s: float
    ) -> None:
        """
        Args:
            model: whose stage it is.
            stages: all of that model's that may sleep, as deployments.
            resources: names of what a replica takes.
            reports_load: whether the replicas say how busy they are, or Serve counts requests.
            downscale_delay_s: how long few ask before the stage shrinks, or nobody before the model sleeps.
        """
        self._model, self._stages, self._resources = model, stages, resources
        self._count: Count = load_policy if reports_load else replica_queue_length_autoscaling_policy
        self._delay_s = downscale_delay_s
        self._low_since_s: float | None = None

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        now_s, stage = float(context.current_time or 0.0), context.deployment_name
        use = _models.setdefault((context.app_name, self._model), ModelUse(now_s, {*self._stages, stage}))
        use.resources.update(self._resources)
        has_requests, is_running = context.total_num_requests > 0, context.current_num_replicas > 0
        use.note(stage, now_s, has_requests=has_requests, is_running=is_running)
        if self._leaves(use, now_s):
            return 0.0, {}
        fewest = min(1.0, context.target_num_replicas)  # no stage sleeps before the others do
        return max(fewest, self._held(context, now_s)), {}

    def _leaves(self, use: ModelUse, now_s: float) -> bool:
        if use.idle_s(now_s) >= max(IDLE_S, self._delay_s):
            use.is_leaving = True
        elif not use.is_leaving and use is _least_recently_used(now_s) and not _is_room_being_made(now_s):
            use.is_leaving = not _unplaced.lasting().isdisjoint(use.resources)
            use.made_room_s = now_s if use.is_leaving else use.made_room_s
        return use.is_leaving

    def _held(self, context: AutoscalingContext, now_s: float) -> float:
        """As many as the requests need; fewer than there are, once that has been so for a while."""
        wanted, _ = self._count(context)
        if math.ceil(wanted) >= context.target_num_replicas:
            self._low_since_s = None
        elif self._low_since_s is None:
            self._low_since_s = now_s
        is_held = self._low_since_s is not None and now_s - self._low_since_s < self._delay_s
        return float(context.target_num_replicas) if is_held else wanted


def _is_room_being_made(now_s: float) -> bool:
    return any(now_s - use.made_room_s < ROOM_S for use in _models.values())


def _least_recently_used(now_s: float) -> ModelUse | None:
    """Of the models that are awake and idle."""
    idle = [use for use in _models.values() if use.is_awake() and use.idle_s(now_s) >= IDLE_S]
    return max(idle, key=lambda use: use.idle_s(now_s), default=None)
