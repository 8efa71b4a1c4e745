"""Ranks of one replica, each in an operating-system process of its own, without Ray."""

import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch

from cluster.meeting import listen, meeting_point
from cluster.place import Place
from deployments.config import EncoderConfig, ModelConfig, TransformerConfig
from deployments.replica import exit_replica
from deployments.request import GenerationRequest
from deployments.stages import load_stage


class RankProcesses:
    """They serve one model after another."""

    def __init__(self, num_ranks: int) -> None:
        spawn = get_context("spawn")
        self._processes = [ProcessPoolExecutor(1, spawn) for _ in range(num_ranks)]
        self._num_open, self._pids = 0, list[int]()

    def ask(self, rank: int, function: Callable[..., Any], *given: Any) -> "Future[Any]":
        return self._processes[rank].submit(function, *given)

    def ask_all(self, function: Callable[..., Any], given: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Ranks 0, 1, …, at once."""
        answers = [self.ask(rank, function, *of) for rank, of in enumerate(given)]
        return [answer.result() for answer in answers]

    def open(self, model: ModelConfig, config: TransformerConfig) -> None:
        """Load and connect; what was open is closed."""
        self.close()
        self._num_open = config.num_ranks
        self._pids = self.ask_all(os.getpid, [()] * config.num_ranks)
        meeting = self.ask(0, _listen).result()
        self.ask_all(_load, [(model, config, rank, meeting) for rank in range(config.num_ranks)])
        rendezvous = self.ask(0, _open_rendezvous, config.num_ranks).result()
        self.ask_all(_connect, [(rendezvous,)] * config.num_ranks)

    def denoise(self, *requests: GenerationRequest) -> list[Any]:
        """All at once: latents, or what was raised."""
        return list(self.ask(0, denoise, requests).result())

    def stats(self) -> list[Any]:
        """RankStats of each rank; with rank 0's the queue's."""
        return self.ask_all(_stats, [()] * self._num_open)

    def batch_sizes(self) -> dict[int, int]:
        return dict(self.ask(0, _batch_sizes).result())

    def kill(self, rank: int) -> None:
        """At work or idle."""
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
"""What this process has: its stage, and of rank 0 the socket that listens."""


def _listen() -> Any:
    _kept["listening"] = listen("127.0.0.1")
    return meeting_point(_kept["listening"])


def _load(model: ModelConfig, config: TransformerConfig, rank: int, meeting: Any) -> None:
    is_shared = config.parallel_degree > 1
    if rank == 0:
        _kept["encode"] = load_stage("encode", model, EncoderConfig(max_sequence_length=64))
        _kept["stage"] = load_stage("denoise", model, config, _kept["listening"] if is_shared else None)
    else:
        _kept["stage"] = load_stage("follow", model, config, rank, meeting if is_shared else None)


def _open_rendezvous(num_ranks: int) -> Any:
    return _kept["stage"].open_rendezvous("127.0.0.1", [Place("node", None)] * num_ranks)


def _connect(rendezvous: Any) -> None:
    _kept["stage"].connect(rendezvous, exit_replica)


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
    """What lets a rank's next forward run out of memory, before its first block or after its last."""
    return partial(_break, component, when)


def _break(component: str, when: str) -> None:
    model = _kept["stage"].loaded.shards[component].model

    def fail(*_: Any) -> None:
        handle.remove()
        raise torch.OutOfMemoryError(f"no room {when}")

    register = model.register_forward_pre_hook if when == "before" else model.register_forward_hook
    handle = register(fail)
