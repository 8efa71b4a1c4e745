"""Watches the steps of a request's scheduler as its pipeline makes them."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch

from deployments.engine.passes import waited_for
from deployments.stages.loop.draws import Draws

AfterStep = Callable[[Any, int, torch.Tensor], None]
"""(scheduler, index of the timestep that is done, latents after it)"""


@contextmanager
def watch_steps(scheduler: Any, draws: Draws | None, after_step: AfterStep | None) -> Iterator[None]:
    """Replaces the scheduler's `step` while the context is open.

    The replacement is a bound method with the signature of the original: pipelines read from the signature whether
    to pass a generator, and a copy of the scheduler has the method too (LTX-2 makes one for the sound).

    after_step: called for the scheduler that steps first, not for its copies.
    """
    original = type(scheduler).step
    drawing = original if draws is None else draws.within(original)
    heard: Any = None
    # Image-to-image skips the first timesteps.
    num_done = 0

    @functools.wraps(original)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal heard, num_done
        if heard is None:
            heard, num_done = self, getattr(self, "begin_index", None) or 0
        args, kwargs = waited_for((args, kwargs))  # before `drawing`, which one request at a time may run
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
        # `step` refers to its scheduler and, through after_step, to the images: such cycles would stay in memory
        # until the garbage collector runs, which may take long.
        heard = after_step = None
        del vars(scheduler)["step"]
