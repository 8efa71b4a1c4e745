"""The rings of the ranks that share the first blocks with rank 0: each gets every micro-batch that rank 0 takes.

Rank 0 starts each of these rings. They return only that a micro-batch is done: predictions come back on rank 0's
own ring. A micro-batch that fails on one rank fails on all (cluster/ranks/parallel_group.py), so no rank is left
waiting.
"""

from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any

import torch

from cluster.machines import accelerator
from cluster.ranks.message import Message
from cluster.ranks.ring import Ring, StopRing
from cluster.ranks.transport import Transport
from deployments.engine.adapters import Applied
from deployments.engine.constant_cache import ConstantSender
from deployments.engine.merge import Inputs
from deployments.engine.micro_batch import MicroBatchMessage

_HOST = torch.device("cpu")


class ParallelRings:
    """Sends micro-batches on these rings. One thread calls `send`, before rank 0's own forward; any thread may
    call `send_again`."""

    def __init__(self, transports: Sequence[Transport], on_failure: Callable[[BaseException], None]) -> None:
        self._sender = ConstantSender()
        self._queues: list[SimpleQueue[Message | None]] = [SimpleQueue() for _ in transports]
        # The host is the device, as rank 0 computes nothing on these rings: a ring that waited for the GPU would
        # wait for rank 0's forward, which in turn waits for these ranks.
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
        batch: Sequence[Inputs],
        ready: Sequence[Any],
        adapters: tuple[Applied, ...],
    ) -> tuple[int, ...]:
        """Sends a micro-batch on every ring. Returns the keys that these ranks release with it.

        ready: events after which the inputs are complete.
        """
        if not self._queues:
            return ()
        released = self._sender.take_released()
        message = MicroBatchMessage(component, tuple(map(self._sender.substitute, batch)), released, {}, adapters)
        for queue in self._queues:
            queue.put(Message(batch_id, (message, ready)))
        return released

    def send_again(self, batch: Sequence[Inputs], released: tuple[int, ...]) -> None:
        """Makes later calls send and release these again: their micro-batch failed, and a rank may lack them."""
        self._sender.release(released)
        for inputs in batch:
            self._sender.forget(inputs)

    def close(self) -> None:
        for queue in self._queues:
            queue.put(None)
        for ring in self._rings:
            ring.close()


def _when_ready(body: tuple[MicroBatchMessage, Sequence[Any]]) -> MicroBatchMessage:
    message, ready = body
    for event in ready:
        accelerator.wait_for(event)
    return message


def _next(queue: "SimpleQueue[Message | None]") -> Message:
    message = queue.get()
    if message is None:
        raise StopRing
    return message


def _ignore(message: Message) -> None:
    """Failures are reported on rank 0's own ring too."""
