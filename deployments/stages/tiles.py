"""Tiles of one decode over several replicas, under diffusers' unmodified `tiled_decode`.

It calls the VAE's decoder once for every tile, and blends the tiles when it has them all. So a stand-in for the
decoder answers with a tensor that is waited for when it is first used, and all tiles are there at once: this
replica decodes them from the first on, others that are idle from the last. What they do not bring, this one
decodes itself: so replicas that all spread never wait for each other.
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

from cluster import accelerator
from deployments.engine.passes import Pending, waited_for
from deployments.request import Tile
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
"""VAEs whose tiles know nothing of each other. Others carry state from one call of their decoder to the next
(CogVideoX, Mochi), or blend each tile when they have it (AutoencoderTiny): they decode in one replica."""

Call = tuple[tuple[Any, ...], Mapping[str, Any]]
AskPeer = Callable[[Tile], Sequence[Any] | None]
"""What the decoder returned in another replica; None: none is idle."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.01, 0.5
"""Between two questions whether any other is idle."""
LEAST_PATIENCE_S, PATIENCE = 0.5, 3.0
"""A tile that another replica has for so long, or for so many times what one takes here, is decoded here."""


@dataclass(eq=False)
class _Part:
    """One tile: calls of the decoder, several where those of a video's frames share one cache of features."""

    features: list[Any] | None
    device: torch.device
    calls: list[Call] = field(default_factory=list)
    sent: list[Call] = field(default_factory=list)
    """The same for another replica. Made before anything is decoded: copies wait for what a GPU has to do."""
    is_whole: bool = False
    """Whether all of its calls are known."""
    taken_at: float | None = None
    """None: nobody decodes it."""
    outputs: Sequence[torch.Tensor] | None = None

    @property
    def tile(self) -> Tile:
        num_features = None if self.features is None else len(self.features)
        return Tile(to_cpu(tuple(self.sent)), num_features, lies_channels_last(self.sent[0][0][0]))

    def end(self, outputs: Sequence[torch.Tensor]) -> None:
        """Features are as large as frames."""
        self.outputs, self.calls, self.features = outputs, [], None


class PendingTile(Pending):
    """A tile under way; frames of one are put together when they are used."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.cat and args and all(isinstance(part, cls) for part in args[0]):
            return cls.of(lambda: func(*waited_for(args), **(kwargs or {})))
        return super().__torch_function__(func, types, args, kwargs)


class SpreadDecode(AbstractContextManager["SpreadDecode"]):
    """One decode. Its tiles are asked for and read in one thread; others wait for peers."""

    def __init__(self, vae: Any, ask_peer: AskPeer, num_in_flight: int) -> None:
        """num_in_flight: tiles that are with other replicas at once."""
        self._vae, self._ask_peer, self._num_in_flight = vae, ask_peer, num_in_flight
        self._changed = threading.Condition()  # guards all that follows
        self._parts: list[_Part] = []
        self._threads: list[threading.Thread] = []
        self._has_ended = False
        self._slowest_s = 0.0

    def decode(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As the VAE's own."""
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
        """What to decode here: what is wanted, or else the first that nobody has, or what is late."""
        waiting = [part for part in self._parts if part.taken_at is None]
        if waiting:
            chosen = wanted if wanted in waiting else waiting[0]
            chosen.taken_at = time.perf_counter()
            return chosen
        assert wanted.taken_at is not None
        late_at = wanted.taken_at + max(LEAST_PATIENCE_S, PATIENCE * self._slowest_s)
        came = self._changed.wait_for(
            lambda: wanted.outputs is not None or wanted.taken_at is None, max(0.0, late_at - time.perf_counter())
        )
        return None if came else wanted

    def _decode_here(self, part: _Part, calls: Sequence[Call]) -> None:
        began = time.perf_counter()
        outputs = [self._vae.decoder(*args, **kwargs) for args, kwargs in calls]
        # Else a GPU would have all tiles in its queue at once, and the other replicas none.
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
            except Exception as error:  # the replica is lost, or whatever it raised: it will be raised here too
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
        """Never the first, which is decoded here. Blocks; None: the decode has ended."""
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
    """A VAE's decoder whose calls are noted."""

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


def _sent(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
    """On the CPU, dense, and lying as convolutions would take what they are of."""
    wanted = {name: value for name, value in kwargs.items() if name not in _CACHE}
    sent: Call = map_tensors(lambda one: one.clone().cpu(), (args, wanted))
    return sent


def decode_tile(decoder: Any, tile: Tile, device: torch.device) -> tuple[torch.Tensor, ...]:
    """For another replica: what the decoder returns, on the CPU."""
    features = None if tile.num_features is None else [None] * tile.num_features
    outputs = []
    for args, kwargs in map_tensors(lambda one: one.to(device), tile.calls):
        cache = {} if features is None else {"feat_cache": features, "feat_idx": [0]}
        outputs.append(decoder(laid(args[0], tile.is_channels_last), *args[1:], **kwargs, **cache))
    made: tuple[torch.Tensor, ...] = to_cpu(tuple(outputs))
    return made
