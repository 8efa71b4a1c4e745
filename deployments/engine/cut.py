"""Where a shard begins and ends in its model's forward: stubs for foreign blocks, recorders at the cut.

rank 0   [block 0][block 1]✂ stub   stub        ✂ ends the forward; the boundary leaves here
rank 1    stub  ─▶ stub  ─▶[block 2][block 3]   a stub before the range replays what crossed
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import nn

from deployments.engine.blocks import front_names, tail_names

Output: TypeAlias = "torch.Tensor | list[torch.Tensor] | tuple[Output, ...]"
"""What a block returns, or a model: tuples nest where a UNet block returns its skips."""

Boundary: TypeAlias = dict[str, Output]
"""What crosses a cut: block names and what those blocks returned. The last block before the cut is always
there, others only where the forward reads them again: a UNet's down blocks, for their skips."""


class CutReached(BaseException):
    """Ends a forward at the cut. No `Exception`, so that no `except Exception` on the way swallows it."""

    def __init__(self, boundary: Boundary) -> None:
        super().__init__(boundary)
        self.boundary = boundary


class Cut:
    """The block range `start:end` of one model, and what crosses its two ends during one run."""

    def __init__(self, names: Sequence[str], start: int, end: int) -> None:
        self.names, self.start, self.end = tuple(names), start, end
        self._received: Boundary = {}
        self._recorded: Boundary = {}

    @property
    def is_first(self) -> bool:
        return self.start == 0

    @property
    def is_last(self) -> bool:
        return self.end == len(self.names)

    def foreign_names(self, model: nn.Module) -> tuple[str, ...]:
        """Names of the modules this shard does not hold."""
        front = () if self.is_first else front_names(model)
        tail = () if self.is_last else tail_names(model)
        return front + self.names[: self.start] + self.names[self.end :] + tail

    def stub_foreign(self, model: nn.Module) -> None:
        """Replaces foreign modules for good. List lengths and indices stay, so checkpoint keys do too."""
        front = front_names(model)
        for name in self.foreign_names(model):
            stub = FrontStub if name in front else Stub
            model.set_submodule(name, stub(name, model.get_submodule(name), self))

    @contextmanager
    def open(self, model: nn.Module, boundary: Boundary | None) -> Iterator[None]:
        """Lets one forward of `model` through: from `boundary` to the cut after this range, if there is one.

        Recorders wrap blocks only meanwhile, so blocks may be quantised, cast, offloaded, compiled or given
        adapters at any time between two runs, and their names never change. Nothing stays behind afterwards,
        whatever the forward raises.
        """
        self._received = self._checked(boundary)
        blocks = {name: model.get_submodule(name) for name in self._recorded_names()}
        try:
            for name, block in blocks.items():
                model.set_submodule(name, Recorder(name, block, self))
            yield
        finally:
            for name, block in blocks.items():
                model.set_submodule(name, block)
            self._received, self._recorded = {}, {}

    def replay(self, name: str) -> Output:
        """What the stub of `name` returns: its block's output, if that crossed; else the last that crossed of its
        list, whose blocks return as many tensors; else that of the last block before the range.

        Foreign blocks in between pass through: whatever they return, the last stub's answer replaces it.
        """
        if name not in self.names[: self.start]:
            raise RuntimeError(
                f"{name} was called on the shard that ends at {self.names[self.end - 1]}, which was not: "
                "blocks were skipped or run in another order; serve such requests from one shard"
            )
        if name in self._received:
            return self._received[name]
        siblings = [other for other in self._received if _list_of(other) == _list_of(name)]
        return self._received[siblings[-1] if siblings else self.names[self.start - 1]]

    def record(self, name: str, output: Output) -> None:
        """Notes what a block returned; behind the last block of the range, ends the forward."""
        self._recorded[name] = output
        if name == self.names[self.end - 1]:
            outputs = self._received | self._recorded
            raise CutReached({key: outputs[key] for key in outputs if key == name or self._is_read(key, outputs)})

    def _is_read(self, name: str, outputs: Boundary) -> bool:
        """Whether the forward reads this output behind the cut, or its stub could not pass for it."""
        if name.startswith("down_blocks."):
            return True
        # Between double and single blocks some forwards join text and image. The values are replaced later,
        # but unpacking a pair must find a pair.
        return name in self._list_ends() and _nesting(outputs[name]) != _nesting(outputs[self.names[self.end - 1]])

    def _recorded_names(self) -> list[str]:
        if self.is_last:
            return []
        own = self.names[self.start : self.end]
        ends = self._list_ends()
        return [name for name in own if name.startswith("down_blocks.") or name in ends or name == own[-1]]

    def _list_ends(self) -> set[str]:
        """The last block of each list of blocks."""
        return set({_list_of(name): name for name in self.names}.values())

    def _checked(self, boundary: Boundary | None) -> Boundary:
        if self.is_first:
            if boundary is not None:
                raise ValueError("the first shard starts from the latents; pass boundary=None, not a boundary")
            return {}
        before = self.names[self.start - 1]
        if boundary is None or before not in boundary:
            got = "none" if boundary is None else f"one with {', '.join(boundary)}"
            raise ValueError(
                f"the shard that starts at {self.names[self.start]} needs a boundary with the output of "
                f"{before}, got {got}; pass on what the shard before it returned"
            )
        return boundary


class Stub(nn.Module):
    """Stands, without parameters, for a module of another shard."""

    def __init__(self, name: str, original: nn.Module, cut: Cut) -> None:
        super().__init__()
        self._name, self._cut = name, cut
        self.__dict__["_original"] = original.to("meta")  # past nn.Module, which would list it as a child

    def __getattr__(self, name: str) -> Any:
        """What forwards ask of a block without calling it (`has_cross_attention`, `resnets`)."""
        return _public(self.__dict__["_original"], name, type(self).__name__)

    def forward(self, *_: Any, **__: Any) -> Output:
        return self._cut.replay(self._name)


class FrontStub(Stub):
    """Of what runs before the chain: what it would return is replaced, so its input will do."""

    def forward(self, hidden_states: Output, *_: Any, **__: Any) -> Output:
        return hidden_states


class Recorder(nn.Module):
    """Wraps a block, and hooks and compilation with it, for one run."""

    def __init__(self, name: str, block: nn.Module, cut: Cut) -> None:
        super().__init__()
        self._name, self._cut = name, cut
        self._block = block

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__["_modules"]:
            return self.__dict__["_modules"][name]
        return _public(self.__dict__["_modules"]["_block"], name, type(self).__name__)

    def forward(self, *args: Any, **kwargs: Any) -> Output:
        output: Output = self._block(*args, **kwargs)
        self._cut.record(self._name, output)
        return output


def _public(module: nn.Module, name: str, owner: str) -> Any:
    """Private names (hooks of other libraries, copying and pickling) are the wrapper's own business."""
    if name.startswith("_"):
        raise AttributeError(f"{owner!r} object has no attribute {name!r}")
    return getattr(module, name)


def _list_of(name: str) -> str:
    return name.rpartition(".")[0]


def _nesting(output: Output) -> Any:
    return tuple(map(_nesting, output)) if isinstance(output, tuple) else None
