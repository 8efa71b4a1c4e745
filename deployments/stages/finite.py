"""Checks that a stage's results are finite: NaN would otherwise become a black image."""

from collections.abc import Callable

import torch

from deployments.errors import NonFinite


class FiniteCheck:
    """One stage's check for NaN and infinity."""

    def __init__(self) -> None:
        self.num_refused = 0

    def check(self, tensor: torch.Tensor, explain: Callable[[], str]) -> None:
        """Raises NonFinite, with the message of `explain`, if any element is NaN or infinite."""
        if not bool(tensor.isfinite().all()):
            self.num_refused += 1
            raise NonFinite(explain())


def dtype_advice(option: str, dtype: torch.dtype) -> str:
    """Returns advice about numbers that left the dtype's range. option: the config key of the dtype."""
    name = str(dtype).removeprefix("torch.")
    if dtype == torch.float16:
        return f"float16 ends at 65504: set {option} to bfloat16 or float32, got {name}"
    return f"{option} is {name}, whose range is wide, so the weights or the inputs are at fault"
