"""Computes how many replicas a stage should have. Serve calls the policy several times a second, and applies the
bounds and the upscale delay.

Serve's own policy counts the requests of the last seconds. Here replicas report their load, because a denoiser
works on many requests at once, and on how many depends on their size; and how much work is left, which shows
whether a new replica would be ready in time for it (load_forecast.py). The stages share the cluster's free
resources (stage_uses.py).
"""

import math
from collections.abc import Mapping
from typing import Any

from ray.serve.config import AutoscalingContext

# Serve copies the policy's module, but not these modules: their state is shared.
from cluster.scaling import free_resources, stage_uses
from cluster.scaling.free_resources import Claim
from cluster.scaling.load_forecast import Backlog, LoadForecast
from cluster.scaling.stage_uses import StageUse

LOAD = "load"
"""Reported by replicas through `record_autoscaling_stats`: a replica's work divided by what it can do at once."""
LEFT_S = "left_s"
"""Reported too: how much longer the replica's requests take, in seconds of its whole time."""
REQUEST_S = "request_s"
"""Reported too: measured seconds of the replica's whole time that one request takes."""
COLD_START_S = "cold_start_s"
"""Reported too: seconds from the replica's start until it could serve."""

_ROUNDING = 1e-6


class GrowPolicy:
    """The policy of one stage. Serve's downscale delay must be 0: the policy applies its own, because a stage that
    gives way has none."""

    def __init__(
        self,
        resources: Mapping[str, float],
        num_ranks: int,
        labels: Mapping[str, str],
        shapes: list[dict[str, float]],
        request_s: float,
        is_auto: bool,
        reports_load: bool,
        downscale_delay_s: float,
    ) -> None:
        """
        Args:
            resources: taken by each rank of a replica.
            num_ranks: of a replica.
            labels: required of its nodes.
            shapes: resources of a process, for each stage of the app.
            request_s: seconds that a request takes one replica, until this has been measured.
            is_auto: whether the cluster is the only bound.
            reports_load: whether the replicas report their load; if not, load is the number of requests.
            downscale_delay_s: how long the load must be low before the stage shrinks.
        """
        self._use = StageUse(Claim(resources, num_ranks, labels), request_s, is_auto)
        self._shapes = shapes
        self._reports_load = reports_load
        self._delay_s = downscale_delay_s
        self._forecast = LoadForecast()
        self._low_since_s: float | None = None
        self._share = 1.0
        """Share of a replica's capacity that one request takes."""

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        now_s, target = float(context.current_time or 0.0), context.target_num_replicas
        self._note(context, now_s)
        key = context.app_name, context.deployment_name
        if self._use.is_auto:
            snapshot = free_resources.watch.snapshot()
            if stage_uses.shared.gives_way(key, free_resources.watch.stuck(), now_s):
                return target - 1.0, {}
            return self._held(stage_uses.shared.grant(key, snapshot, now_s), target, now_s), {}
        return self._held(self._use.num_wanted, target, now_s), {}

    def _note(self, context: AutoscalingContext, now_s: float) -> None:
        use = self._use
        use.request_s = _mean(context.aggregated_metrics.get(REQUEST_S, {})) or use.request_s
        use.note(
            now_s,
            context.target_num_replicas,
            context.current_num_replicas,
            context.capacity_adjusted_min_replicas,
        )
        wanted = math.ceil(self._wanted(context, now_s) - _ROUNDING)
        use.num_wanted = min(wanted, context.capacity_adjusted_max_replicas)
        stage_uses.shared.join((context.app_name, context.deployment_name), use, self._shapes)

    def _wanted(self, context: AutoscalingContext, now_s: float) -> float:
        """Returns more replicas than there are if new ones would be ready in time, and fewer if the present ones
        have little to do, now and soon.

        Until some replica has reported a load, returns the present target: replicas that are still loading report
        none, but are needed all the same.
        """
        target, num_ready = context.target_num_replicas, context.current_num_replicas
        is_needed = context.total_num_requests > 0  # a stage must not sleep while requests are on the way to it
        is_silent = self._reports_load and LOAD not in context.aggregated_metrics
        if not num_ready or is_silent:
            return float(max(target, is_needed))
        backlog = self._backlog(context)
        cold_start_s = _mean(context.aggregated_metrics.get(COLD_START_S, {}))
        forecast = self._forecast.load(now_s, backlog, num_ready, cold_start_s)
        target_load = float(context.config.get_target_ongoing_requests())
        return max(forecast / target_load, min(float(target), backlog.load / target_load), float(is_needed))

    def _backlog(self, context: AutoscalingContext) -> Backlog:
        """Returns the backlog; requests that no replica has yet count as much as those that one has."""
        request_s, num_requests = self._use.request_s, context.total_num_requests
        if not self._reports_load:
            return Backlog(num_requests, num_requests * request_s, request_s)
        num_running, metrics = context.total_running_requests, context.aggregated_metrics
        load = sum(metrics[LOAD].values())
        left_s = sum(metrics[LEFT_S].values()) if LEFT_S in metrics else num_running * request_s
        if num_running and load:
            self._share = min(load / num_running, 1.0)
        fresh_s = request_s / self._share
        if num_running:
            load *= num_requests / num_running
        return Backlog(load, left_s + (num_requests - num_running) * request_s, fresh_s)

    def _held(self, granted: int, target: int, now_s: float) -> float:
        """Returns the present target until fewer replicas have been wanted for the whole downscale delay."""
        if granted >= target:
            self._low_since_s = None
        elif self._low_since_s is None:
            self._low_since_s = now_s
        is_held = self._low_since_s is not None and now_s - self._low_since_s < self._delay_s
        return float(target if is_held else granted)


def _mean(values: Mapping[Any, float]) -> float:
    return sum(values.values()) / len(values) if values else 0.0
