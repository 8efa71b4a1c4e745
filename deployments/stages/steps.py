"""The steps of a request's scheduler, as its pipeline makes them."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch

from deployments.engine.passes import waited_for
from deployments.stages.draws import Draws

AfterStep = Callable[[Any, int, torch.Tensor], None]
"""(scheduler, index of the timestep that is done, latents after it)"""


@contextmanager
def watch_steps(scheduler: Any, draws: Draws | None, after_step: AfterStep | None) -> Iterator[None]:
    """In place. A bound method with the signature of the original: pipelines read from it whether to pass a
    generator, and those that copy their scheduler copy it too (LTX-2, for the sound).

    after_step: hears of the scheduler that steps first, and not of its copies.
    """
    original = type(scheduler).step
    drawing = original if draws is None else draws.within(original)
    heard: Any = None
    # Of a picture that is drawn anew, the first timesteps are left out.
    num_done = 0

    @functools.wraps(original)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal heard, num_done
        if heard is None:
            heard, num_done = self, getattr(self, "begin_index", None) or 0
        args, kwargs = waited_for((args, kwargs))  # here, for one request at a time draws
        result = drawing(self, *args, **kwargs)
        if self is heard:
            num_done += 1
            if after_step is not None:
                after_step(self, num_done - 1, result[0])
        return result

    vars(scheduler)["step"] = MethodType(step, scheduler)
    try:
        yield
    finally:
        # It holds its scheduler and, by after_step, the pictures: cycles that nobody would collect for long.
        heard = after_step = None
        del vars(scheduler)["step"]
