"""Loads one model's stage, and those of the models that share its weights."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from deployments.config.model import ModelConfig
from deployments.stages.warm_up import WarmUp


class _WarmsUp(Protocol):
    def warm_up(self, warm_up: WarmUp, /) -> None: ...


Stage = TypeVar("Stage", bound=_WarmsUp)


def load_sharing(
    load: Callable[[ModelConfig, tuple[ModelConfig, Stage] | None], Stage],
    model: ModelConfig,
    warm_up: WarmUp,
    sharing: Sequence[tuple[ModelConfig, WarmUp]],
    run: Callable[..., Any],
) -> dict[str | None, Stage]:
    """Loads and warms up the stages, by model name.

    Args:
        load: loads the stage of a model. The second argument is the owner of the weights; None: the model itself.
        sharing: the other models, each with its warm-up.
        run: calls its first argument with the others, in the thread where stages are to be warmed up.
    """
    own = load(model, None)
    stages: dict[str | None, Stage] = {model.name: own}
    for other, _ in sharing:
        stages[other.name] = load(other, (model, own))
    for served, blank in ((model, warm_up), *sharing):
        run(stages[served.name].warm_up, blank)
    return stages
