"""Spreads the tiles of one decode over several replicas, with diffusers' unmodified `tiled_decode`.

`tiled_decode` calls the VAE's decoder once for every tile, and blends the tiles when it has all of them. So a
stand-in for the decoder returns a tensor that is waited for when it is first used, and all tiles are known at
once. This replica decodes them from the first on, and idle replicas decode them from the last on. A tile that
another replica does not return is decoded here, so replicas that all spread tiles never wait for each other.
"""

import copy
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from cluster.machines import accelerator
from deployments.answers import Tile
from deployments.engine.passes import Pending, waited_for
from deployments.stages.tensors import laid, lies_channels_last, map_tensors, to_cpu

log = logging.getLogger("ray.serve")

SPREAD_CLASSES = frozenset(
    {
        "AutoencoderDC",
        "AutoencoderKL",
        "AutoencoderKLFlux2",
        "AutoencoderKLHunyuanImage",
        "AutoencoderKLHunyuanVideo",
        "AutoencoderKLLTXVideo",
        "AutoencoderKLQwenImage",
        "AutoencoderKLWan",
    }
)
"""VAEs whose tiles are independent. Other VAEs carry state from one call of their decoder to the next (CogVideoX,
Mochi), or blend each tile at once (AutoencoderTiny), so they decode in one replica."""

DecoderCall = tuple[tuple[Any, ...], Mapping[str, Any]]
AskPeer = Callable[[Tile], Sequence[Any] | None]
"""Returns what the decoder returned in another replica; None: no replica is idle."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.01, 0.5
"""Pause between two attempts to find an idle replica."""
MIN_TIMEOUT_S, TIMEOUT_FACTOR = 0.5, 3.0
"""A tile that another replica has had for MIN_TIMEOUT_S, and for TIMEOUT_FACTOR x the time of the slowest tile
here, is decoded here."""


@dataclass(eq=False)
class _Part:
    """One tile: calls of the decoder; several if those of a video's frames share one cache of features."""

    features: list[Any] | None
    device: torch.device
    calls: list[DecoderCall] = field(default_factory=list)
    sent: list[DecoderCall] = field(default_factory=list)
    """Copies of the calls, for another replica. Made before anything is decoded, because a copy waits for the work
    that is queued on the GPU."""
    is_whole: bool = False
    """Whether all calls of the tile are known."""
    taken_at: float | None = None
    """When a replica took the tile; None: no replica decodes it."""
    outputs: Sequence[torch.Tensor] | None = None

    @property
    def tile(self) -> Tile:
        num_features = None if self.features is None else len(self.features)
        return Tile(to_cpu(tuple(self.sent)), num_features, lies_channels_last(self.sent[0][0][0]))

    def end(self, outputs: Sequence[torch.Tensor]) -> None:
        """Stores the outputs, and frees calls and features: features are as large as frames."""
        self.outputs, self.calls, self.features = outputs, [], None


class PendingTile(Pending):
    """A tile that is being decoded. `torch.cat` of a tile's frames waits only when its result is used."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.cat and args and all(isinstance(part, cls) for part in args[0]):
            return cls.of(lambda: func(*waited_for(args), **(kwargs or {})))
        return super().__torch_function__(func, types, args, kwargs)


class SpreadDecode(AbstractContextManager["SpreadDecode"]):
    """One decode. One thread submits and reads its tiles; other threads wait for other replicas."""

    def __init__(self, vae: Any, ask_peer: AskPeer, num_in_flight: int) -> None:
        """num_in_flight: most tiles that are at other replicas at once."""
        self._vae, self._ask_peer, self._num_in_flight = vae, ask_peer, num_in_flight
        self._changed = threading.Condition()  # guards all that follows
        self._parts: list[_Part] = []
        self._threads: list[threading.Thread] = []
        self._has_ended = False
        self._slowest_s = 0.0

    def decode(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Decodes like the VAE's own `decode`."""
        changed = copy.copy(self._vae)
        vars(changed)["decoder"] = _Decoder(self._vae.decoder, self._add)
        pixels: torch.Tensor = waited_for(changed.decode(*args, **kwargs, return_dict=False)[0])
        return pixels

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._has_ended = True
            self._changed.notify_all()

    # The decode's own thread.

    def _add(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Pending:
        features = kwargs.get("feat_cache")
        with self._changed:
            last = self._parts[-1] if self._parts else None
            if last is None or last.is_whole or last.features is not features:
                if last is not None:
                    last.is_whole = True
                last = _Part(features, args[0].device)
                self._parts.append(last)
            place = len(last.calls)
            last.calls.append((args, kwargs))
            last.sent.append(_sent(args, kwargs))
            last.is_whole = features is None
            self._changed.notify_all()
        if len(self._parts) > 1 and not self._threads:
            self._start_threads()
        return PendingTile.of(lambda: self._read(last)[place])

    def _read(self, part: _Part) -> Sequence[torch.Tensor]:
        while True:
            with self._changed:
                self._parts[-1].is_whole = True
                self._changed.notify_all()
                if part.outputs is not None:
                    return part.outputs
                next_part = self._choose(part)
                calls = [] if next_part is None else next_part.calls
            if next_part is not None and calls:
                self._decode_here(next_part, calls)

    def _choose(self, wanted: _Part) -> _Part | None:
        """Returns the tile to decode here: `wanted` if no replica has it, else the first that no replica has, else
        `wanted` once it is late. None: `wanted` has come meanwhile, or was given back."""
        waiting = [part for part in self._parts if part.taken_at is None]
        if waiting:
            chosen = wanted if wanted in waiting else waiting[0]
            chosen.taken_at = time.perf_counter()
            return chosen
        assert wanted.taken_at is not None
        late_at = wanted.taken_at + max(MIN_TIMEOUT_S, TIMEOUT_FACTOR * self._slowest_s)
        came = self._changed.wait_for(
            lambda: wanted.outputs is not None or wanted.taken_at is None, max(0.0, late_at - time.perf_counter())
        )
        return None if came else wanted

    def _decode_here(self, part: _Part, calls: Sequence[DecoderCall]) -> None:
        began = time.perf_counter()
        outputs = [self._vae.decoder(*args, **kwargs) for args, kwargs in calls]
        # Otherwise all tiles would be queued on this GPU at once, and none would be left to other replicas.
        accelerator.synchronize(part.device)
        self._slowest_s = max(self._slowest_s, time.perf_counter() - began)
        self._finish(part, outputs)

    # Threads that wait for other replicas.

    def _start_threads(self) -> None:
        for _ in range(self._num_in_flight):
            thread = threading.Thread(target=self._ask, name="tiles", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _ask(self) -> None:
        pause_s = FIRST_PAUSE_S
        while (part := self._take_last()) is not None:
            tile = part.tile
            try:
                outputs = self._ask_peer(tile)
            except Exception as error:  # the replica is lost, or the error will be raised here too
                log.info("another replica did not decode a tile: %s", error)
                outputs = None
            if outputs is not None:
                self._finish(part, [output.to(part.device, copy=True) for output in outputs])
                pause_s = FIRST_PAUSE_S
                continue
            with self._changed:
                part.taken_at = None if part.outputs is None else part.taken_at
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._has_ended, pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _take_last(self) -> _Part | None:
        """Takes the last tile that no replica has. Never takes the first, which is decoded here.

        Blocks. None: the decode has ended.
        """
        found: list[_Part] = []

        def is_there() -> bool:
            found[:] = [part for part in self._parts[1:] if part.is_whole and part.taken_at is None]
            return self._has_ended or bool(found)

        with self._changed:
            self._changed.wait_for(is_there)
            if self._has_ended:
                return None
            found[-1].taken_at = time.perf_counter()
            return found[-1]

    def _finish(self, part: _Part, outputs: Sequence[torch.Tensor]) -> None:
        with self._changed:
            if part.outputs is None:
                part.end(outputs)
            self._changed.notify_all()


class _Decoder:
    """A stand-in for a VAE's decoder that passes its calls to `add`."""

    def __init__(self, decoder: Any, add: Callable[[tuple[Any, ...], Mapping[str, Any]], Pending]) -> None:
        self._decoder, self._add = decoder, add

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._decoder)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_decoder"], name)

    def __call__(self, *args: Any, **kwargs: Any) -> Pending:
        return self._add(args, kwargs)


_CACHE = frozenset({"feat_cache", "feat_idx"})


def _sent(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> DecoderCall:
    """Copies a call to the CPU. Tensors become dense but keep the memory layout that convolutions see."""
    wanted = {name: value for name, value in kwargs.items() if name not in _CACHE}
    sent: DecoderCall = map_tensors(lambda one: one.clone().cpu(), (args, wanted))
    return sent


def decode_tile(decoder: Any, tile: Tile, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Decodes a tile for another replica; returns the decoder's outputs, on the CPU."""
    features = None if tile.num_features is None else [None] * tile.num_features
    outputs = []
    for args, kwargs in map_tensors(lambda one: one.to(device), tile.calls):
        cache = {} if features is None else {"feat_cache": features, "feat_idx": [0]}
        outputs.append(decoder(laid(args[0], tile.is_channels_last), *args[1:], **kwargs, **cache))
    made: tuple[torch.Tensor, ...] = to_cpu(tuple(outputs))
    return made
