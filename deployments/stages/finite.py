"""What a stage answers must be numbers: NaN would go on as a black picture."""

from collections.abc import Callable

import torch

from deployments.refusal import NotFinite


class FiniteCheck:
    """Of one stage."""

    def __init__(self) -> None:
        self.num_refused = 0

    def check(self, tensor: torch.Tensor, explain: Callable[[], str]) -> None:
        """Raises NotFinite, with what `explain` says, if any element is NaN or infinite."""
        if not bool(tensor.isfinite().all()):
            self.num_refused += 1
            raise NotFinite(explain())


def dtype_advice(option: str, dtype: torch.dtype) -> str:
    """What to do about numbers that left their range. option: the config's key for dtype."""
    name = str(dtype).removeprefix("torch.")
    if dtype == torch.float16:
        return f"float16 ends at 65504: set {option} to bfloat16 or float32, got {name}"
    return f"{option} is {name}, whose range is wide: the weights, or what came before, are at fault"
