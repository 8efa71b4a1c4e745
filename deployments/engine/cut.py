"""Cuts a shard out of its model's forward: stubs replace other shards' blocks, recorders end the forward.

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
"""Return value of a block or a model; tuples are nested where a UNet block returns its skips."""

Boundary: TypeAlias = dict[str, Output]
"""Outputs that cross a cut, by block name. The last block before the cut is always included; other blocks only if
the forward reads their outputs again, as it does those of a UNet's down blocks, for their skips."""


class CutReached(BaseException):
    """Ends a forward at the cut. Derives from BaseException, so that no `except Exception` swallows it."""

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
        """Returns the names of the modules that this shard does not hold."""
        front = () if self.is_first else front_names(model)
        tail = () if self.is_last else tail_names(model)
        return front + self.names[: self.start] + self.names[self.end :] + tail

    def stub_foreign(self, model: nn.Module) -> None:
        """Permanently replaces foreign modules. List lengths and indices stay, so checkpoint keys do too."""
        front = front_names(model)
        for name in self.foreign_names(model):
            stub = FrontStub if name in front else Stub
            model.set_submodule(name, stub(name, model.get_submodule(name), self))

    @contextmanager
    def open(self, model: nn.Module, boundary: Boundary | None) -> Iterator[None]:
        """Prepares `model` for one forward, from `boundary` to the cut after this range, if there is one.

        Recorders wrap blocks only during that forward, so blocks may be quantised, cast, offloaded, compiled or
        given adapters at any time between two runs, and their names never change. Everything is restored
        afterwards, whatever the forward raises.
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
        """Returns what the stub of `name` returns, the first of these that there is:

        1. the block's own output, if it was sent;
        2. the last output that was sent of a block in the same list, which has equally many tensors;
        3. the output of the last block before the range.

        Only the values of the last stub matter, because its output replaces those of the stubs before it.
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
        """Records what a block returned; after the last block of the range, ends the forward with CutReached."""
        self._recorded[name] = output
        if name == self.names[self.end - 1]:
            outputs = self._received | self._recorded
            raise CutReached({key: outputs[key] for key in outputs if key == name or self._is_read(key, outputs)})

    def _is_read(self, name: str, outputs: Boundary) -> bool:
        """Returns whether this output must cross the cut: the forward reads it again after the cut, or its stub
        would return something of another structure."""
        if name.startswith("down_blocks."):
            return True
        # Between double and single blocks some forwards join text and image. The values are replaced later,
        # but code that unpacks a pair must get a pair.
        return name in self._list_ends() and _nesting(outputs[name]) != _nesting(outputs[self.names[self.end - 1]])

    def _recorded_names(self) -> list[str]:
        if self.is_last:
            return []
        own = self.names[self.start : self.end]
        ends = self._list_ends()
        return [name for name in own if name.startswith("down_blocks.") or name in ends or name == own[-1]]

    def _list_ends(self) -> set[str]:
        """Returns the last block of each list of blocks."""
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
    """Replaces a module of another shard; has no parameters."""

    def __init__(self, name: str, original: nn.Module, cut: Cut) -> None:
        super().__init__()
        self._name, self._cut = name, cut
        self.__dict__["_original"] = original.to("meta")  # bypasses nn.Module, which would list it as a child

    def __getattr__(self, name: str) -> Any:
        """Returns what forwards read of a block without calling it (`has_cross_attention`, `resnets`)."""
        return _public(self.__dict__["_original"], name, type(self).__name__)

    def forward(self, *_: Any, **__: Any) -> Output:
        return self._cut.replay(self._name)


class FrontStub(Stub):
    """Stub of a module before the chain. Its output is replaced later, so it returns its input."""

    def forward(self, hidden_states: Output, *_: Any, **__: Any) -> Output:
        return hidden_states


class Recorder(nn.Module):
    """Wraps a block, including its hooks and compilation, for one run, and records its output."""

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
    """Returns a public attribute of `module`. Private names, used by other libraries' hooks and by copying and
    pickling, are not looked up in the wrapped module."""
    if name.startswith("_"):
        raise AttributeError(f"{owner!r} object has no attribute {name!r}")
    return getattr(module, name)


def _list_of(name: str) -> str:
    return name.rpartition(".")[0]


def _nesting(output: Output) -> Any:
    return tuple(map(_nesting, output)) if isinstance(output, tuple) else None
