"""Builds the schedulers that requests may ask for, as diffusers' users do: from the checkpoint's own scheduler."""

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

import diffusers

from deployments.errors import CannotServe, describe_cause
from deployments.options.schedulers import SchedulerConfig


def build_schedulers(pipe: Any, configs: Sequence[SchedulerConfig]) -> Mapping[str, Any]:
    """Returns schedulers by their names in requests. Raises CannotServe if one cannot serve the checkpoint."""
    return {config.asked_as: _build(pipe.scheduler, config) for config in configs}


def _build(own: Any, config: SchedulerConfig) -> Any:
    where = f"model.schedulers, {config.asked_as}"
    scheduler_class: Any = getattr(diffusers, config.class_name, None)
    if scheduler_class is None:
        raise CannotServe(f"{where}: diffusers {diffusers.__version__} has it only for internal use")
    if unknown := config.options.keys() - signature(scheduler_class.__init__).parameters.keys():
        raise CannotServe(f"{where}: {config.class_name} has no option {', '.join(sorted(unknown))}")
    try:
        scheduler = scheduler_class.from_config(own.config, **config.options)
    except Exception as error:  # diffusers' dummy class for a missing package raises too
        raise CannotServe(f"{where}: {describe_cause(error)}") from error
    if _reads(scheduler) != _reads(own):
        raise CannotServe(
            f"{where}: it reads the model's predictions as {_reads(scheduler)}, but the checkpoint's own "
            f"{type(own).__name__} as {_reads(own)}, so it would draw noise: leave it out, or set its options"
        )
    return scheduler


def _reads(scheduler: Any) -> str:
    """Returns how a scheduler interprets predictions. Flow models, whose sigmas run from 1 to 0, have classes of
    their own; some other classes support them by an option."""
    settings = scheduler.config
    if type(scheduler).__name__.startswith("Flow") or settings.get("use_flow_sigmas"):
        return "flow_prediction"
    kind: str = settings.get("prediction_type", "epsilon")
    return f"{kind} without use_flow_sigmas" if kind == "flow_prediction" else kind
