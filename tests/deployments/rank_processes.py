"""Runs the ranks of one replica, each in its own operating-system process, without Ray."""

import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

from cluster.ranks.place import Place
from cluster.ranks.store_address import listen, store_address
from deployments.config.encoder import EncoderConfig
from deployments.config.model import ModelConfig
from deployments.config.transformer import TransformerConfig
from deployments.options.adapter import Adapter
from deployments.replica.lifecycle import exit_replica
from deployments.request import GenerationRequest
from deployments.stages import load_stage
from tests.deployments.forked import forking


class RankProcesses:
    """A process for each rank; they serve one model after another."""

    def __init__(self, num_ranks: int) -> None:
        context = forking()
        self._processes = [ProcessPoolExecutor(1, context) for _ in range(num_ranks)]
        self._num_open, self._pids = 0, list[int]()

    def ask(self, rank: int, function: Callable[..., Any], *given: Any) -> "Future[Any]":
        return self._processes[rank].submit(function, *given)

    def ask_all(self, function: Callable[..., Any], given: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Calls the function on ranks 0, 1, … at once, with one tuple of arguments each; returns the results."""
        answers = [self.ask(rank, function, *of) for rank, of in enumerate(given)]
        return [answer.result() for answer in answers]

    def open(self, model: ModelConfig, config: TransformerConfig) -> None:
        """Loads the model on all ranks and connects them; closes the model that was open."""
        self.close()
        self._num_open = config.num_ranks
        self._pids = self.ask_all(os.getpid, [()] * config.num_ranks)
        store = self.ask(0, _listen).result()
        self.ask_all(_load, [(model, config, rank, store) for rank in range(config.num_ranks)])
        rendezvous = self.ask(0, _open_rendezvous, config.num_ranks).result()
        self.ask_all(_connect, [(rendezvous,)] * config.num_ranks)

    def load_adapter(self, adapter: Adapter) -> None:
        """Loads an adapter into slot 0 of all ranks but rank 0, which reads the weights for them, as in a replica.

        Call it before any other adapter is loaded.
        """
        weights = self.ask(0, _read_adapter, adapter).result()
        for rank in range(1, self._num_open):
            self.ask(rank, _load_adapter, weights).result()

    def denoise(self, *requests: GenerationRequest) -> list[Any]:
        """Denoises the requests at once; returns the latents, or the exception, of each."""
        return list(self.ask(0, denoise, requests).result())

    def stats(self) -> list[Any]:
        """Returns the RankStats of each rank."""
        return self.ask_all(_stats, [()] * self._num_open)

    def batch_sizes(self) -> dict[int, int]:
        return dict(self.ask(0, _batch_sizes).result())

    def kill(self, rank: int) -> None:
        """Kills the rank's process, whether it is working or idle."""
        os.kill(self._pids[rank], signal.SIGKILL)

    def close(self) -> None:
        if self._num_open:
            self.ask(0, _close).result()
            self.ask_all(_forget, [()] * self._num_open)
        self._num_open = 0

    def end(self) -> None:
        for process in self._processes:
            process.shutdown(wait=False, cancel_futures=True)


_kept: dict[str, Any] = {}
"""Objects of this process: its stage and, on rank 0, the encode stage and the listening socket."""


def _listen() -> Any:
    _kept["listening"] = listen("127.0.0.1")
    return store_address(_kept["listening"])


def _load(model: ModelConfig, config: TransformerConfig, rank: int, store: Any) -> None:
    is_shared = config.parallel_degree > 1
    if rank == 0:
        _kept["encode"] = load_stage("encode", model, EncoderConfig(max_sequence_length=64))
        _kept["stage"] = load_stage("denoise", model, config, _kept["listening"] if is_shared else None)
    else:
        _kept["stage"] = load_stage("worker", model, config, rank, store if is_shared else None)


def _open_rendezvous(num_ranks: int) -> Any:
    return _kept["stage"].open_rendezvous("127.0.0.1", [Place("node", None)] * num_ranks)


def _connect(rendezvous: Any) -> None:
    _kept["stage"].connect(rendezvous, exit_replica)


def _read_adapter(adapter: Adapter) -> Any:
    return _kept["stage"].adapters._reader.read(adapter)


def _load_adapter(weights: Any) -> None:
    _kept["stage"].load_adapter(0, weights)


def denoise(requests: Sequence[GenerationRequest]) -> list[Any]:
    encodings = [_kept["encode"].encode(request) for request in requests]  # tokenizers are not thread-safe
    with ThreadPoolExecutor(len(requests)) as threads:
        return list(threads.map(_denoise_one, encodings, requests))


def _denoise_one(encodings: Any, request: GenerationRequest) -> Any:
    stage = _kept["stage"]
    seat = stage.join()
    try:
        return stage.denoise(seat, encodings, request).latents
    except Exception as error:
        return error
    finally:
        stage.leave(seat)


def _stats() -> Any:
    stats = _kept["stage"].stats()
    return stats.ranks[0] if hasattr(stats, "ranks") else stats


def _batch_sizes() -> Any:
    return dict(_kept["stage"].stats().queue.batch_sizes)


def _close() -> None:
    _kept["stage"].close()


def _forget() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    _kept.clear()


def broken_at(component: str, when: str) -> Callable[[], None]:
    """Returns a function that makes a rank's next forward run out of memory, before its first block or after its
    last."""
    return partial(_break, component, when)


def _break(component: str, when: str) -> None:
    model = _kept["stage"].loaded.shards[component].model

    def fail(*_: Any) -> None:
        handle.remove()
        raise torch.OutOfMemoryError(f"no room {when}")

    register = model.register_forward_pre_hook if when == "before" else model.register_forward_hook
    handle = register(fail)
