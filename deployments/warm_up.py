"""What a replica runs through its stage before it says that it is ready, so that no user waits for compiling."""

from dataclasses import dataclass

from deployments.request import GenerationRequest


@dataclass(frozen=True)
class WarmUp:
    """Blank requests, one for each size in `model.warm_up`. Each stage makes its own inputs for them."""

    requests: tuple[GenerationRequest, ...] = ()
    max_sequence_length: int | None = None
    """As the encoder is told: the denoiser's inputs depend on it. None: the family's."""


NO_WARM_UP = WarmUp()
