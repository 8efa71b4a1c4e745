"""A transport without process groups: messages are in Ray's object store, references to them in mailboxes.

For systems on which process groups do not work, and as a baseline: a hand-off takes 4 to 16 times as long.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress

import ray
import torch
from ray.exceptions import RayError
from ray.util.queue import Queue

from cluster.machines import accelerator
from cluster.ranks.message import Message, Packed, never, pack, unpack
from cluster.ranks.transport import PeerLost

_CPU = torch.device("cpu")


def open_mailboxes(world_size: int) -> tuple[Queue, ...]:
    """Opens one mailbox for each rank; every rank gets them all. They end with the process that opened them."""
    return tuple(Queue(actor_options={"num_cpus": 0}) for _ in range(world_size))


class ObjectStoreTransport:
    """Puts messages into the object store, and references to them into the next rank's mailbox.

    It does not detect a neighbour's death: the neighbour's actor must be watched.
    """

    def __init__(self, rank: int, mailboxes: Sequence[Queue], *, device: torch.device) -> None:
        """device: where tensors of the accelerator arrive; tensors of the CPU stay on the CPU."""
        self.bytes_sent = 0
        self._rank, self._device = rank, device
        self._mailbox, self._next_mailbox = mailboxes[rank], mailboxes[(rank + 1) % len(mailboxes)]
        self._is_closed = False

    def send(self, message: Message) -> None:
        packed = pack(message, _CPU)
        accelerator.synchronize_stream(self._device)
        try:
            if self._is_closed:
                raise PeerLost(f"rank {self._rank} has closed its transport")
            # In a list, because Ray would replace a bare reference by the message.
            self._next_mailbox.put([ray.put([packed.host.numpy(), packed.device.numpy()])])
        except RayError as error:
            raise PeerLost(f"rank {self._rank} cannot send to the next rank: {error}") from error
        self.bytes_sent += packed.num_bytes

    def receive(self, is_busy: Callable[[], bool] = never) -> Message:
        try:
            references = [] if self._is_closed else self._mailbox.get()
            if not references:
                raise PeerLost(f"rank {self._rank} or the rank before has closed its transport")
            buffers = (torch.tensor(array) for array in ray.get(references[0]))  # copies the read-only arrays
        except RayError as error:
            raise PeerLost(f"rank {self._rank} cannot receive from the rank before: {error}") from error
        message = unpack(Packed(*buffers), self._device, is_busy)
        accelerator.synchronize_stream(self._device)
        return message

    def close(self) -> None:
        self._is_closed = True
        for mailbox in (self._mailbox, self._next_mailbox):
            with suppress(RayError):
                mailbox.put([])
