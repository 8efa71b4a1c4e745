"""Rank 0 of a shard group: requests' threads on one side, the ring of ranks on the other."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from cluster import accelerator
from cluster.message import Message
from cluster.ring import Agree, Ring, RingStats, StopRing, no_peers
from cluster.transport import Transport
from deployments.config import TransformerConfig
from deployments.engine.adapters import NO_ADAPTERS, Applied
from deployments.engine.merge import Inputs, Mergers, num_samples, num_tokens, split
from deployments.engine.peers import Peers
from deployments.engine.seat import Seat
from deployments.engine.step_queue import StepQueue
from deployments.engine.work import Leader
from deployments.memory.needs import Kept, Needs
from deployments.refusal import OutOfShare, ShardGroupLost

TURN_S = 10.0
"""Of one of several denoisers that are on the GPU one at a time: as long as a stage's, `OnDemandConfig.turn_s`."""


@dataclass(frozen=True, eq=False)
class _Asked:
    """One forward, as its request's thread has asked for it."""

    component: str
    inputs: Inputs
    ready: Any
    """The event after which the inputs are there: requests have a stream beside the one that computes."""
    adapters: Applied


@dataclass(frozen=True)
class _Flight:
    """What is known of a micro-batch until it is back."""

    payloads: tuple[Inputs, ...]
    released: tuple[int, ...]
    """Keys that the other ranks are to let go of."""
    released_by_peers: tuple[int, ...]


class Engine:
    """Takes single forwards from many threads and gives each its prediction back."""

    def __init__(
        self,
        leader: Leader,
        mergers: Mergers,
        config: TransformerConfig,
        *,
        device: torch.device,
        transport: Transport | None = None,
        peers: Sequence[Transport] = (),
        agree: Agree = no_peers,
        patch_sizes: Mapping[str, Any] = MappingProxyType({}),
        needs: Needs | None = None,
        foresee: Callable[[str, Inputs], tuple[int, int]] | None = None,
        adapter_bytes: Callable[[], int] = int,
        on_lost: Callable[[BaseException], None],
    ) -> None:
        """
        Args:
            transport: to the next rank and from the last; None where there is only this one.
            peers: to the ranks that share the first blocks with this one, each beginning a ring of its own.
            agree: with them, on what becomes of a micro-batch (`ParallelGroup.agree`).
            patch_sizes: by component, latent positions per token and axis, by which the cost of a forward is told.
            needs: of memory, of this rank's forwards; None: they are not limited.
            foresee: (component, inputs) -> (bytes of weights, bytes of tensors in one such forward); comes with
                needs.
            adapter_bytes: of adapters on the device.
            on_lost: the group is no more, and the requests were told; end the process.
        """
        self._mergers, self._patch_sizes, self._on_lost = mergers, patch_sizes, on_lost
        self._needs, self._foresee, self._leader = needs, foresee, leader
        self._adapter_bytes = adapter_bytes
        self._max_batch_size, self._device = config.max_batch_size, device
        self._flights: dict[int, _Flight] = {}
        self.queue = StepQueue(
            num_shards=config.num_shards,
            max_batch_size=config.max_batch_size,
            batch_wait_s=config.batch_wait_ms / 1e3,
            max_batch_tokens=config.max_batch_tokens,
            tells_idle=config.leaves_when_idle,
            turn_s=TURN_S if config.has_one_model_at_a_time and len(mergers) > 1 else 0.0,
        )
        self._peers = Peers(peers, self.lose)
        self._ring = Ring(
            self._compute,
            transport=transport,
            source=self._take,
            sink=self._land,
            on_failure=self.lose,
            stuck_after_s=config.stuck_limit_s,
            device=device,
            agree=agree,
        )
        self._ring.start()

    def forward(self, seat: Seat, component: str, inputs: Inputs) -> Any:
        """One forward of a denoiser, perhaps merged with others': what the model returns without `return_dict`.
        The request's thread calls it and waits, and may use the tensors on its own stream.

        Raises Cancelled, ShardGroupLost, NeverFits, or what the forward itself raised.
        """
        return self.begin(seat, 0, component, inputs)()

    def begin(
        self, seat: Seat, place: int, component: str, inputs: Inputs, *, adapters: Applied = NO_ADAPTERS
    ) -> Callable[[], Any]:
        """The same, to be waited for once, by the request's thread: what is returned does what `forward` does.

        Args:
            place: 0, or another that no forward of this request has which has begun and was not waited for.
            adapters: that are loaded on all ranks. Forwards with other adapters, or none, may fly with this one.
        """
        signature = self._signature(component, inputs)
        tokens = num_tokens(inputs, self._patch_sizes.get(component, 1))
        under_way = [
            self.queue.submit(
                self.queue.seat_of(seat, place),
                _Asked(component, inputs, accelerator.mark_queued(self._device), adapters),
                signature=signature,
                tokens=tokens,
                at_most=self._at_most(seat, signature, tokens, component, inputs),
                model=component,
            )
        ]

        def wait() -> Any:
            output = (
                under_way.pop().result()
            )  # a failed future in a frame of a traceback would keep its payload alive
            if accelerator.is_accelerator(self._device):
                tree_map_only(torch.Tensor, accelerator.use_here, output)
            return output

        return wait

    def _signature(self, component: str, inputs: Inputs) -> Hashable:
        """Two denoisers' forwards are never merged."""
        return component, self._mergers[component].signature(inputs)

    def _at_most(self, seat: Seat, signature: Hashable, tokens: int, component: str, inputs: Inputs) -> int | None:
        """How many such forwards fit the memory at once."""
        if self._needs is None or self._foresee is None or not self._mergers[component].knows_signatures:
            return None
        label = f"a forward of {tokens} latent positions"
        foresee = partial(self._foresee, component, inputs)
        kept = Kept(seat.kept_bytes, self._kept_bytes)
        return self._needs.at_most(signature, label, foresee, up_to=self._max_batch_size, kept=kept)

    @property
    def _kept_bytes(self) -> int:
        """On the device beside weights and forwards."""
        return self.queue.kept_bytes() + self._adapter_bytes()

    def _compute(self, body: tuple[Sequence[_Asked], tuple[int, ...]]) -> Any:
        asked, released = body
        for forward in asked:
            accelerator.queue_after(forward.ready, self._device)
        group = [forward.inputs for forward in asked]
        adapters = tuple(forward.adapters for forward in asked)
        if not group:
            return self._leader.rest(released)
        component = asked[0].component
        if self._needs is None:
            return self._leader.run(component, group, released, adapters)
        signature, kept_bytes = self._signature(component, group[0]), self._kept_bytes
        with self._needs.measured(signature, len(group), kept_bytes=kept_bytes):
            return self._leader.run(component, group, released, adapters)

    def lose(self, cause: BaseException) -> None:
        """The group is lost: every waiting thread gets ShardGroupLost, and so does whoever runs this."""
        error = ShardGroupLost(f"the shard group is lost: {type(cause).__name__}: {cause}")
        self.queue.close(error)
        self._on_lost(error)

    def close(self) -> None:
        """An orderly end; the other ranks end with it."""
        self.queue.close(StopRing("the replica is shutting down"))
        self._ring.close()
        self._peers.close()

    def stats(self) -> RingStats:
        """Of rank 0."""
        own = self._ring.stats()
        return replace(own, bytes_sent=own.bytes_sent + self._peers.bytes_sent)

    def _take(self) -> Message:
        batch = self.queue.take()
        group = tuple(asked.inputs for asked in batch.payloads)
        component = batch.payloads[0].component if batch.payloads else None
        ready, adapters = [each.ready for each in batch.payloads], tuple(each.adapters for each in batch.payloads)
        to_peers = self._peers.send(batch.id, component, group, ready, adapters)
        flight = _Flight(group, self._leader.take_released(), to_peers)
        self._flights[batch.id] = flight
        return Message(batch.id, (batch.payloads, flight.released))

    def _land(self, message: Message) -> None:
        flight = self._flights.pop(message.batch_id)
        if message.error is None:
            sizes = [num_samples(inputs) for inputs in flight.payloads]
            self.queue.finish(message.batch_id, split(message.body, sizes) if sizes else ())
            return
        self._leader.release_again(flight.released)
        self._peers.send_again(flight.payloads, flight.released_by_peers)
        error: BaseException = message.error
        if isinstance(error, torch.OutOfMemoryError):  # of what a rank received; its own work says OutOfShare
            error = OutOfShare(f"a rank has no room for what the one before hands on: {error}")
        if len(flight.payloads) > 1 and isinstance(error, OutOfShare):
            for inputs in flight.payloads:
                self._leader.send_again(inputs)
            self.queue.part(message.batch_id)
        else:
            self.queue.fail(message.batch_id, error)
