"""How many replicas a stage should have whose replicas know better than Serve how busy they are.

Serve's own policy counts requests: right for a stage that works on one after another. A denoiser works on many at
once, and on how many depends on their size: eight small pictures fly together where one large one flies alone.
"""

from typing import Any

from ray.serve.config import AutoscalingContext

LOAD = "load"
"""What such a replica reports through `record_autoscaling_stats`: its work over what it can do at once."""


def load_policy(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """As many replicas as bring each to its target load; Serve applies the bounds and delays of the config.

    Requests that no replica has yet weigh as much as those that one has. While no replica is ready, as many are
    wanted as were: one that is still loading has no load, and no less reason to be there.
    """
    is_needed = context.total_num_requests > 0  # a stage whose requests are on the way must not fall asleep
    if context.current_num_replicas == 0:
        return float(max(context.target_num_replicas, is_needed)), {}
    load = sum(context.aggregated_metrics.get(LOAD, {}).values())
    if context.total_running_requests:
        load *= context.total_num_requests / context.total_running_requests
    num_replicas = load / context.config.get_target_ongoing_requests()
    return max(num_replicas, float(is_needed)), {}
