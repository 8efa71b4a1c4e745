"""Rank 0's way to the ranks that share the first blocks with it: each gets every micro-batch that rank 0 takes.

Each of them is on a ring of its own, which rank 0 begins, and where what comes back is only word that it is done:
predictions come by rank 0's own ring. What fails, fails on all (`cluster.parallel_group`), so nobody waits here.
"""

from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any

import torch

from cluster import accelerator
from cluster.message import Message
from cluster.ring import Ring, StopRing
from cluster.transport import Transport
from deployments.engine.adapters import Applied
from deployments.engine.merge import Inputs
from deployments.engine.outline import Outliner
from deployments.engine.work import Work

_HOST = torch.device("cpu")


class Peers:
    """One thread calls `send`, before its own forward; any may call `send_again`."""

    def __init__(self, transports: Sequence[Transport], on_failure: Callable[[BaseException], None]) -> None:
        self._outliner = Outliner()
        self._queues: list[SimpleQueue[Message | None]] = [SimpleQueue() for _ in transports]
        # Nothing is computed for them here: who waited for the GPU waited for rank 0's forward, and so for them.
        self._rings = [
            Ring(
                _when_ready,
                transport=transport,
                source=lambda queue=queue: _next(queue),  # type: ignore[misc]
                sink=_ignore,
                on_failure=on_failure,
                device=_HOST,
            )
            for transport, queue in zip(transports, self._queues, strict=True)
        ]
        for ring in self._rings:
            ring.start()

    @property
    def bytes_sent(self) -> int:
        return sum(ring.stats().bytes_sent for ring in self._rings)

    def send(
        self,
        batch_id: int,
        component: str | None,
        group: Sequence[Inputs],
        ready: Sequence[Any],
        adapters: tuple[Applied, ...],
    ) -> tuple[int, ...]:
        """The keys that they are told to let go of. ready: events after which the inputs are there."""
        if not self._queues:
            return ()
        released = self._outliner.take_released()
        work = Work(component, tuple(map(self._outliner.outline, group)), released, {}, adapters)
        for queue in self._queues:
            queue.put(Message(batch_id, (work, ready)))
        return released

    def send_again(self, group: Sequence[Inputs], released: tuple[int, ...]) -> None:
        """Their micro-batch failed, and not every rank may have seen it."""
        self._outliner.release(released)
        for inputs in group:
            self._outliner.forget(inputs)

    def close(self) -> None:
        for queue in self._queues:
            queue.put(None)
        for ring in self._rings:
            ring.close()


def _when_ready(body: tuple[Work, Sequence[Any]]) -> Work:
    work, ready = body
    for event in ready:
        accelerator.wait_for(event)
    return work


def _next(queue: "SimpleQueue[Message | None]") -> Message:
    message = queue.get()
    if message is None:
        raise StopRing
    return message


def _ignore(message: Message) -> None:
    """What failed, rank 0's own ring tells too."""
