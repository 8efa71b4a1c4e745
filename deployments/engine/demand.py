"""What a request demands of the step queue: its work, priority and deadline."""

import math
from collections.abc import Hashable
from dataclasses import dataclass

from deployments.options.qos import DEFAULT_QOS, Qos
from deployments.request import GenerationRequest


@dataclass(frozen=True)
class Demand:
    """A request's amount of work, priority and deadline."""

    qos: Qos = DEFAULT_QOS
    kind: Hashable = None
    """Steps of one kind take equally long. None: unknown, and not measured."""
    megapixels: float = 0.0
    """Megapixels (x frames) of a step, from which the time of a step of a new kind is estimated."""
    num_steps: int = 0
    """All steps of the request."""
    num_own_steps: int = 0
    """Lower bound of the steps that this replica runs: image-to-image skips the first ones."""

    @classmethod
    def of(cls, request: GenerationRequest, qos: Qos, num_done: int = 0) -> "Demand":
        """num_done: steps that another replica has done."""
        prompt, num_steps = request.prompt, request.num_inference_steps
        strength = 1.0 if request.strength is None else request.strength
        model = (request.model, request.size, request.kind, request.step_cache)
        guided = (prompt.is_guided, request.guidance_scale, request.true_cfg_scale)
        return cls(
            qos,
            kind=(*model, *guided),
            megapixels=request.megapixel_steps / num_steps,
            num_steps=num_steps,
            num_own_steps=max(0, math.ceil(num_steps * strength) - num_done),
        )


UNKNOWN = Demand()
