"""Rank 0 of a shard group: connects the requests' threads with the ring of ranks."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from cluster.machines import accelerator
from cluster.ranks.message import Message
from cluster.ranks.ring import Agree, Ring, RingStats, StopRing, no_peers
from cluster.ranks.transport import Transport
from deployments.config.transformer import TransformerConfig
from deployments.engine.adapters import NO_ADAPTERS, Applied
from deployments.engine.merge import Inputs, Mergers, num_samples, num_tokens, split
from deployments.engine.micro_batch import MicroBatchDriver
from deployments.engine.order import ORDERS
from deployments.engine.parallel_rings import ParallelRings
from deployments.engine.seat import Seat
from deployments.engine.step_queue import StepQueue
from deployments.errors import OutOfDeviceMemory, ShardGroupLost
from deployments.memory.admission import MemoryAdmission, Retained

TIME_SLICE_S = 10.0
"""Time slice of a denoiser if one at a time is on the GPU: the same as a stage's in `TimeSharingConfig`."""


@dataclass(frozen=True, eq=False)
class _Asked:
    """One forward, as its request's thread has submitted it."""

    component: str
    inputs: Inputs
    ready: Any
    """The event after which the inputs are complete: requests use another stream than the one that computes."""
    adapters: Applied


@dataclass(frozen=True)
class _SentBatch:
    """What rank 0 keeps of a micro-batch until its result is back."""

    payloads: tuple[Inputs, ...]
    released: tuple[int, ...]
    """Keys that the other ranks are told to release."""
    released_on_parallel_rings: tuple[int, ...]


class Engine:
    """Takes single forwards from many threads and returns each one's prediction."""

    def __init__(
        self,
        driver: MicroBatchDriver,
        mergers: Mergers,
        config: TransformerConfig,
        *,
        device: torch.device,
        transport: Transport | None = None,
        parallel_transports: Sequence[Transport] = (),
        agree: Agree = no_peers,
        patch_sizes: Mapping[str, Any] = MappingProxyType({}),
        admission: MemoryAdmission | None = None,
        estimate: Callable[[str, Inputs], tuple[int, int]] | None = None,
        adapter_bytes: Callable[[], int] = int,
        on_lost: Callable[[BaseException], None],
    ) -> None:
        """
        Args:
            transport: to the next rank and from the last one; None if this is the only rank.
            parallel_transports: to the ranks that share the first blocks with this one, one ring for each.
            agree: agrees with those ranks on the error that a micro-batch fails with (`ParallelGroup.agree`).
            patch_sizes: by component, latent positions per token and axis; needed for the cost of a forward.
            admission: memory admission of this rank's forwards; None: they are not limited.
            estimate: (component, inputs) -> (bytes of weights, bytes of tensors in one such forward); needed with
                admission.
            adapter_bytes: returns the bytes of the adapters on the device.
            on_lost: called when the group is lost and the requests have failed; ends the process.
        """
        self._mergers, self._patch_sizes, self._on_lost = mergers, patch_sizes, on_lost
        self._admission, self._estimate, self._driver = admission, estimate, driver
        self._adapter_bytes = adapter_bytes
        self._max_batch_size, self._device = config.max_batch_size, device
        self._sent: dict[int, _SentBatch] = {}
        self.queue = _build_queue(config, len(mergers))
        self._parallel_rings = ParallelRings(parallel_transports, self.lose)
        self._ring = Ring(
            self._compute,
            transport=transport,
            source=self._take,
            sink=self._receive,
            on_failure=self.lose,
            stuck_after_s=config.stuck_limit_s,
            device=device,
            agree=agree,
        )
        self._ring.start()

    def forward(self, seat: Seat, component: str, inputs: Inputs) -> Any:
        """Runs one forward of a denoiser, perhaps merged with others; returns what the model does without
        `return_dict`. Blocks the request's thread, which may use the tensors on its own stream.

        Raises Cancelled, ShardGroupLost, ExceedsMemory, or what the forward itself raised.
        """
        return self.begin(seat, 0, component, inputs)()

    def begin(
        self, seat: Seat, slot: int, component: str, inputs: Inputs, *, adapters: Applied = NO_ADAPTERS
    ) -> Callable[[], Any]:
        """Submits a forward and returns at once; call the result once, in the request's thread, to wait for it.

        Args:
            slot: an index that none of this request's unread forwards uses.
            adapters: loaded on all ranks. Forwards with other adapters, or none, may be merged with this one.
        """
        signature = self._signature(component, inputs)
        tokens = num_tokens(inputs, self._patch_sizes.get(component, 1))
        under_way = [
            self.queue.submit(
                self.queue.seat_of(seat, slot),
                _Asked(component, inputs, accelerator.mark_queued(self._device), adapters),
                signature=signature,
                tokens=tokens,
                max_merged=self._max_admissible(seat, signature, tokens, component, inputs),
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
        """Returns the signature of a forward. Forwards of two denoisers differ in it, so they are never merged."""
        return component, self._mergers[component].signature(inputs)

    def _max_admissible(
        self, seat: Seat, signature: Hashable, tokens: int, component: str, inputs: Inputs
    ) -> int | None:
        """Returns how many such forwards fit into memory at once; None: they are not limited."""
        if self._admission is None or self._estimate is None or not self._mergers[component].knows_signatures:
            return None
        label = f"a forward of {tokens} latent positions"
        estimate = partial(self._estimate, component, inputs)
        retained = Retained(seat.retained_bytes, self._retained_bytes)
        return self._admission.max_admissible(
            signature, label, estimate, up_to=self._max_batch_size, retained=retained
        )

    @property
    def _retained_bytes(self) -> int:
        """Bytes that requests and adapters keep on the device, in addition to weights and forwards."""
        return self.queue.retained_bytes() + self._adapter_bytes()

    def _compute(self, body: tuple[Sequence[_Asked], tuple[int, ...]]) -> Any:
        asked, released = body
        for forward in asked:
            accelerator.queue_after(forward.ready, self._device)
        inputs = [forward.inputs for forward in asked]
        adapters = tuple(forward.adapters for forward in asked)
        if not inputs:
            return self._driver.idle(released)
        component = asked[0].component
        if self._admission is None:
            return self._driver.run(component, inputs, released, adapters)
        signature, retained_bytes = self._signature(component, inputs[0]), self._retained_bytes
        with self._admission.measured(signature, len(inputs), retained_bytes=retained_bytes):
            return self._driver.run(component, inputs, released, adapters)

    def lose(self, cause: BaseException) -> None:
        """Ends all work after the group is lost: every waiting thread, and `on_lost`, gets a ShardGroupLost."""
        error = ShardGroupLost(f"the shard group is lost: {type(cause).__name__}: {cause}")
        self.queue.close(error)
        self._on_lost(error)

    def close(self) -> None:
        """Ends the engine in an orderly way, and the other ranks with it."""
        self.queue.close(StopRing("the replica is shutting down"))
        self._ring.close()
        self._parallel_rings.close()

    def stats(self) -> RingStats:
        """Figures of rank 0."""
        own = self._ring.stats()
        return replace(own, bytes_sent=own.bytes_sent + self._parallel_rings.bytes_sent)

    def _take(self) -> Message:
        batch = self.queue.take()
        inputs = tuple(asked.inputs for asked in batch.payloads)
        component = batch.payloads[0].component if batch.payloads else None
        ready, adapters = [each.ready for each in batch.payloads], tuple(each.adapters for each in batch.payloads)
        released_on_parallel_rings = self._parallel_rings.send(batch.id, component, inputs, ready, adapters)
        sent = _SentBatch(inputs, self._driver.take_released(), released_on_parallel_rings)
        self._sent[batch.id] = sent
        return Message(batch.id, (batch.payloads, sent.released))

    def _receive(self, message: Message) -> None:
        sent = self._sent.pop(message.batch_id)
        if message.error is None:
            sizes = [num_samples(inputs) for inputs in sent.payloads]
            self.queue.finish(message.batch_id, split(message.body, sizes) if sizes else ())
            return
        self._driver.release_again(sent.released)
        self._parallel_rings.send_again(sent.payloads, sent.released_on_parallel_rings)
        error: BaseException = message.error
        if isinstance(error, torch.OutOfMemoryError):  # on receiving; in a forward it is OutOfDeviceMemory
            error = OutOfDeviceMemory(f"a rank has no memory for what the rank before it sends: {error}")
        if len(sent.payloads) > 1 and isinstance(error, OutOfDeviceMemory):
            for inputs in sent.payloads:
                self._driver.send_again(inputs)
            self.queue.retry_alone(message.batch_id)
        else:
            self.queue.fail(message.batch_id, error)


def _build_queue(config: TransformerConfig, num_models: int) -> StepQueue:
    return StepQueue(
        num_shards=config.num_shards,
        max_batch_size=config.max_batch_size,
        batch_wait_s=None if config.batch_wait_ms is None else config.batch_wait_ms / 1e3,
        max_batch_tokens=config.max_batch_tokens,
        tells_idle=config.leaves_when_idle,
        order=ORDERS[config.order](),
        max_at_work=config.max_ongoing_requests,
        time_slice_s=TIME_SLICE_S if config.has_one_model_at_a_time and num_models > 1 else 0.0,
    )
