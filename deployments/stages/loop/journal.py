"""The journal of a request: the outputs of its denoisers, from which another replica resumes if this one dies.

Everything else that a pipeline's call computes is cheap and deterministic: the state of schedulers, generators,
guiders and step caches, and whatever its loop keeps. So a request is resumed by running its call again, with
forwards answered from the journal as far as it goes. The result is the same to the bit for every pipeline and
scheduler.
"""

import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from cluster.machines import accelerator
from deployments.answers import JournalPart, num_bytes
from deployments.checkpoints.components import is_controlnet
from deployments.engine.denoiser_stand_in import Submit
from deployments.engine.merge import Inputs
from deployments.engine.passes import Begin
from deployments.options.resume import OnPart, ResumeConfig, UnsavedPart
from deployments.stages.tensors import map_tensors


@dataclass(eq=False)
class _Forward:
    component: str
    output: Any = None
    is_done: bool = False


class Journal:
    """The journal of one request. Not thread-safe: a request has one thread."""

    def __init__(
        self,
        begin: Begin,
        zeros: Submit,
        device: torch.device,
        config: ResumeConfig,
        fingerprint: str,
        parts: Sequence[JournalPart] = (),
        on_part: OnPart | None = None,
    ) -> None:
        """
        Args:
            begin: submits a forward that is to be computed.
            zeros: returns zeros for outputs that are not kept because they are not needed.
            parts: parts from a replica that died; those that do not fit are ignored.
            on_part: called with each part that is to be saved; None: nothing is saved.
        """
        self._begin, self._zeros, self._device = begin, zeros, device
        self._config, self._fingerprint, self._on_part = config, fingerprint, on_part
        fitting = fitting_parts(parts, fingerprint)
        self._last = fitting[-1] if fitting else None
        self._num_replayed = 0 if self._last is None else self._last.num_steps
        self._answers = deque(forward for part in fitting for forward in part.forwards)
        self.num_resumed = len(self._answers)
        """Number of forwards that are not computed again."""
        self._num_bytes = sum(part.nbytes for part in fitting)
        self._num_steps, self._saved_at = 0, time.perf_counter()
        self._saving: UnsavedPart | None = None
        self._forwards: deque[_Forward] = deque()
        """Forwards since the last part."""

    def begin(self, slot: int, component: str, inputs: Inputs) -> Callable[[], Any]:
        """Like `Engine.begin`, for one request's forwards; answers them from the journal as far as it goes."""
        if self._answers:
            return self._replayed(component, inputs)
        wait = self._begin(slot, component, inputs)
        if not self._keeps:
            return wait
        forward = _Forward(component)
        self._forwards.append(forward)

        def kept() -> Any:
            output = wait()
            if not is_controlnet(component):
                forward.output = map_tensors(accelerator.copy_to_host, output)
                self._num_bytes += num_bytes(forward.output)
            forward.is_done = True
            return output

        return kept

    @property
    def is_replaying(self) -> bool:
        """Whether the current step was already done by another replica."""
        return self._num_steps < self._num_replayed

    def after_step(self, *, is_last: bool) -> None:
        """Notes that one more timestep of the scheduler is done; saves a part if one is due."""
        self._num_steps += 1
        if self._keeps and not is_last and self._is_due():
            self._save()

    @property
    def _keeps(self) -> bool:
        is_full = self._num_bytes > self._config.max_mib * 2**20
        return self._on_part is not None and self._config.every_steps is not None and not is_full

    def _is_due(self) -> bool:
        num_saved = 0 if self._last is None else self._last.num_steps
        assert self._config.every_steps is not None
        return (
            self._num_steps - num_saved >= self._config.every_steps
            and time.perf_counter() - self._saved_at >= self._config.every_s
            and (self._saving is None or self._saving.is_saved)
        )

    def _save(self) -> None:
        """Saves all forwards that are done, up to the first that the pipeline has not waited for."""
        assert self._on_part is not None
        done = []
        while self._forwards and self._forwards[0].is_done:
            forward = self._forwards.popleft()
            done.append((forward.component, forward.output))
        number, after = (0, None) if self._last is None else (self._last.number + 1, self._last.id)
        part = JournalPart(self._fingerprint, number, secrets.token_hex(8), after, self._num_steps, tuple(done))
        self._last = replace(part, forwards=())
        self._saved_at = time.perf_counter()
        self._saving = UnsavedPart(part, partial(accelerator.wait_for, accelerator.mark_queued(self._device)))
        self._on_part(self._saving)

    def _replayed(self, component: str, inputs: Inputs) -> Callable[[], Any]:
        kept, output = self._answers.popleft()
        if kept != component:
            raise RuntimeError(f"the pipeline calls its {component} where it had called its {kept}")
        if is_controlnet(component):
            return partial(self._zeros, component, inputs)
        # A copy, because pipelines and schedulers may write into what they get.
        return lambda: map_tensors(lambda tensor: tensor.to(self._device, copy=True), output)


def fitting_parts(parts: Sequence[JournalPart], fingerprint: str) -> list[JournalPart]:
    """Returns the first parts, as many as belong to this request and follow each other."""
    fitting: list[JournalPart] = []
    for part in parts:
        after = fitting[-1].id if fitting else None
        if (part.fingerprint, part.number, part.after) != (fingerprint, len(fitting), after):
            break
        fitting.append(part)
    return fitting
