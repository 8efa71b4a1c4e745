"""The message that carries a micro-batch along the ranks, and the driver (rank 0) and workers that process it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Protocol

from deployments.engine.adapters import Applied, Rows
from deployments.engine.constant_cache import ConstantCache, ConstantSender, only_shapes
from deployments.engine.cut import Boundary, Output
from deployments.engine.merge import Inputs, Mergers, num_samples


class Blocks(Protocol):
    """This rank's blocks of every denoiser, as `LoadedRank` runs them."""

    def run(
        self, component: str, inputs: Inputs, boundary: Boundary | None = None, rows: Sequence[Rows] = ()
    ) -> "Boundary | Output": ...


def _rows(batch: Sequence[Inputs], adapters: Sequence[Applied]) -> list[Rows]:
    return [Rows(num_samples(inputs), own) for inputs, own in zip(batch, adapters, strict=True)]


OnIdle = Callable[[], None]


def do_nothing() -> None:
    """Default `on_idle`: weights stay loaded."""


@dataclass(frozen=True, eq=False)
class MicroBatchMessage:
    """The message that one rank sends to the next. The last rank sends only the predictions back to rank 0."""

    component: str | None
    """The denoiser that runs the forwards; None: no request is left, so each rank may free device memory."""
    inputs: tuple[Inputs, ...]
    """One per forward, with keys in place of constant tensors. Every rank merges them itself, so that embeddings
    are sent only once."""
    released: tuple[int, ...]
    """Keys of tensors that no later micro-batch uses."""
    boundary: Boundary
    """Output of the blocks before the cut, for the whole batch; empty if there are no blocks before it."""
    adapters: tuple[Applied, ...] = ()
    """One per forward."""


class MicroBatchDriver:
    """Rank 0's side: starts each micro-batch."""

    def __init__(
        self,
        blocks: Blocks,
        mergers: Mergers,
        sender: ConstantSender,
        shape_only: Mapping[str, frozenset[str]],
        on_idle: OnIdle = do_nothing,
    ) -> None:
        """shape_only: by component, names of the inputs of which later shards do not need the values."""
        self._blocks, self._mergers, self._on_idle = blocks, mergers, on_idle
        self._sender, self._shape_only = sender, shape_only

    def run(
        self, component: str, batch: Sequence[Inputs], released: tuple[int, ...], adapters: tuple[Applied, ...]
    ) -> "MicroBatchMessage | Output":
        """Runs the first blocks on forwards of one signature. adapters: one entry per forward."""
        output = self._blocks.run(component, self._mergers[component].merge(batch), rows=_rows(batch, adapters))
        if not isinstance(output, dict):
            return output
        substituted = tuple(self._sender.substitute(inputs, self._shape_only[component]) for inputs in batch)
        return MicroBatchMessage(component, substituted, released, output, adapters)

    def idle(self, released: tuple[int, ...]) -> MicroBatchMessage:
        """Runs `on_idle`; returns the message that tells the other ranks that no request is left."""
        self._on_idle()
        return MicroBatchMessage(None, (), released, {})

    def take_released(self) -> tuple[int, ...]:
        """Returns the keys to release with the next micro-batch."""
        return self._sender.take_released()

    def release_again(self, keys: tuple[int, ...]) -> None:
        """Releases keys again after their micro-batch failed, because some ranks may not have seen them."""
        self._sender.release(keys)

    def send_again(self, inputs: Inputs) -> None:
        """Marks tensors to be sent again after their micro-batch failed: some ranks may not have them."""
        self._sender.forget(inputs)


class MicroBatchWorker:
    """The side of every other rank: runs its blocks of each micro-batch."""

    def __init__(
        self,
        blocks: Blocks,
        mergers: Mergers,
        cache: ConstantCache,
        on_idle: OnIdle = do_nothing,
        *,
        shape_only: Mapping[str, frozenset[str]] = MappingProxyType({}),
        is_heard: bool = True,
    ) -> None:
        """
        Args:
            shape_only: by component, names of the inputs of which later shards do not need the values; set on a
                rank that has the first blocks.
            is_heard: whether rank 0 takes the predictions from this rank, among those that share each forward.
        """
        self._blocks, self._mergers, self._cache, self._on_idle = blocks, mergers, cache, on_idle
        self._shape_only, self._is_heard = shape_only, is_heard

    def run(self, message: MicroBatchMessage) -> "MicroBatchMessage | Output | None":
        """Runs this rank's blocks on the output of the rank before.

        Returns the message for the next rank; after the last blocks the predictions, or None unless `is_heard`.
        """
        self._cache.release(message.released)
        if message.component is None:
            self._on_idle()
            return message
        batch = [self._cache.resolve(substituted) for substituted in message.inputs]
        inputs = self._mergers[message.component].merge(batch)
        rows = _rows(batch, message.adapters)
        output = self._blocks.run(message.component, inputs, message.boundary or None, rows)
        if not isinstance(output, dict):
            return output if self._is_heard else None
        names = self._shape_only.get(message.component, frozenset())
        substituted = tuple(only_shapes(own, of, names) for own, of in zip(message.inputs, batch, strict=True))
        return replace(message, inputs=substituted, boundary=output)
