"""A micro-batch on its way along the ranks, and what every rank does with it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Protocol

from deployments.engine.adapters import Applied, Rows
from deployments.engine.cut import Boundary, Output
from deployments.engine.merge import Inputs, Mergers, num_samples
from deployments.engine.outline import Holder, Outliner, only_shapes


class Blocks(Protocol):
    """This rank's blocks of every denoiser, as `LoadedRank` runs them."""

    def run(
        self, component: str, inputs: Inputs, boundary: Boundary | None = None, rows: Sequence[Rows] = ()
    ) -> "Boundary | Output": ...


def _rows(group: Sequence[Inputs], adapters: Sequence[Applied]) -> list[Rows]:
    return [Rows(num_samples(inputs), own) for inputs, own in zip(group, adapters, strict=True)]


OnIdle = Callable[[], None]


def do_nothing() -> None:
    """Where weights stay."""


@dataclass(frozen=True, eq=False)
class Work:
    """From one rank to the next. The last rank sends the bare predictions, of the whole batch, back to rank 0."""

    component: str | None
    """The denoiser whose forward it is; None where no request is left: then each rank may make room."""
    inputs: tuple[Inputs, ...]
    """One per forward, outlined; every rank merges them itself, so that embeddings need not cross again."""
    released: tuple[int, ...]
    """Keys of tensors that no later micro-batch will name."""
    boundary: Boundary
    """What the blocks before the cut returned, for the whole batch; empty where none are before."""
    adapters: tuple[Applied, ...] = ()
    """One per forward."""


class Leader:
    """Rank 0's part of a micro-batch."""

    def __init__(
        self,
        blocks: Blocks,
        mergers: Mergers,
        outliner: Outliner,
        shape_only: Mapping[str, frozenset[str]],
        on_idle: OnIdle = do_nothing,
    ) -> None:
        """shape_only: by component, names of inputs of which later shards need no values."""
        self._blocks, self._mergers, self._on_idle = blocks, mergers, on_idle
        self._outliner, self._shape_only = outliner, shape_only

    def run(
        self, component: str, group: Sequence[Inputs], released: tuple[int, ...], adapters: tuple[Applied, ...]
    ) -> "Work | Output":
        """The first blocks of a group of forwards of one signature. adapters: of each."""
        output = self._blocks.run(component, self._mergers[component].merge(group), rows=_rows(group, adapters))
        if not isinstance(output, dict):
            return output
        outlined = tuple(self._outliner.outline(inputs, self._shape_only[component]) for inputs in group)
        return Work(component, outlined, released, output, adapters)

    def rest(self, released: tuple[int, ...]) -> Work:
        """No request is left."""
        self._on_idle()
        return Work(None, (), released, {})

    def take_released(self) -> tuple[int, ...]:
        """The keys to let go of that the next micro-batch takes along."""
        return self._outliner.take_released()

    def release_again(self, keys: tuple[int, ...]) -> None:
        """Their micro-batch failed, and not every rank may have seen them."""
        self._outliner.release(keys)

    def send_again(self, inputs: Inputs) -> None:
        """Their micro-batch failed, and not every rank may have them."""
        self._outliner.forget(inputs)


class Follower:
    """Any other rank's part."""

    def __init__(
        self,
        blocks: Blocks,
        mergers: Mergers,
        holder: Holder,
        on_idle: OnIdle = do_nothing,
        *,
        shape_only: Mapping[str, frozenset[str]] = MappingProxyType({}),
        is_heard: bool = True,
    ) -> None:
        """
        Args:
            shape_only: by component, names of inputs of which later shards need no values, of a rank that has the
                first blocks.
            is_heard: whether rank 0 takes the predictions from this one, of the ranks that share each forward.
        """
        self._blocks, self._mergers, self._holder, self._on_idle = blocks, mergers, holder, on_idle
        self._shape_only, self._is_heard = shape_only, is_heard

    def run(self, work: Work) -> "Work | Output | None":
        """These blocks, from where the rank before left off."""
        self._holder.release(work.released)
        if work.component is None:
            self._on_idle()
            return work
        group = [self._holder.fill(outlined) for outlined in work.inputs]
        inputs = self._mergers[work.component].merge(group)
        rows = _rows(group, work.adapters)
        output = self._blocks.run(work.component, inputs, work.boundary or None, rows)
        if not isinstance(output, dict):
            return output if self._is_heard else None
        names = self._shape_only.get(work.component, frozenset())
        outlined = tuple(only_shapes(own, of, names) for own, of in zip(work.inputs, group, strict=True))
        return replace(work, inputs=outlined, boundary=output)
