"""Measures one checkpoint's times on this machine: all stages in this process, one image after another."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

from torch import nn

from cluster.machines import accelerator
from deployments.config.model import ModelConfig
from deployments.config.stage import StageConfig
from deployments.engine.blocks import cuttable_names, tail_names
from deployments.plan.plan import StageConfigs
from deployments.plan.profile import DenoiserTimes, Times
from deployments.request import MediaSize
from deployments.stages import load_stage
from deployments.stages.warm_up import default_request

_FORWARD = "the whole forward"
Config = TypeVar("Config", bound=StageConfig)


def measure(
    model: ModelConfig, stages: StageConfigs, sizes: tuple[MediaSize, ...], *, num_steps: int
) -> Mapping[str, Times]:
    """Returns times by `str(size)`. Each is the second of two runs, in `num_steps` steps.

    The denoisers are loaded whole, whatever the config's shards: they must fit here, if need be by
    `vram_limit_gib`.
    """
    loaded = _Loaded(model, stages)
    try:
        return {str(size): [loaded.draw(size, num_steps) for _ in range(2)][1] for size in sizes}
    finally:
        loaded.denoising.close()


class _Loaded:
    """All three stages, loaded in this process."""

    def __init__(self, model: ModelConfig, stages: StageConfigs) -> None:
        self._model = model
        whole = {"shards": 1, "cuts": None, "context_parallel": 1, "tensor_parallel": 1, "compile": None}
        self._encoding = load_stage("encode", model, _alone(stages.encoder))
        self.denoising = load_stage("denoise", model, _alone(stages.transformer.model_copy(update=whole)))
        self._decoding = load_stage("decode", model, _alone(stages.vae))
        # Weights that move to the device during a call would be counted as its tensors.
        self._holds_still = not any(config.moves_weights for config in stages.by_stage().values())
        self.denoising.connect(None, _raise)
        shards = self.denoising.loaded.shards
        self._stopwatches = {name: _Stopwatch(shard.model) for name, shard in shards.items()}

    def draw(self, size: MediaSize, num_steps: int) -> Times:
        """Makes one image, and returns how long every part took."""
        request = default_request(self._model, size, num_steps)
        usual = default_request(self._model, size).num_inference_steps
        working = dict[str, int]()
        for watch in self._stopwatches.values():
            watch.clear()
        encodings, encode_s = _timed("encode", working, partial(self._encoding.encode, request))
        seat = self.denoising.join()
        try:
            denoise = partial(self.denoising.denoise, seat, encodings, request)
            arguments, _ = _timed("denoise", working, denoise)
        finally:
            self.denoising.leave(seat)
        _, decode_s = _timed("decode", working, partial(self._decoding.decode, arguments, request))
        return Times(
            encode_s=encode_s,
            denoisers={name: watch.times(usual / num_steps) for name, watch in self._stopwatches.items()},
            decode_s=decode_s,
            working_bytes=working if working and self._holds_still else None,
        )


class _Stopwatch:
    """Measures the times of a denoiser's forwards, and of its parts in each forward."""

    def __init__(self, model: nn.Module) -> None:
        self._blocks, self._tail = cuttable_names(model), tail_names(model)
        self._seconds: dict[str, list[float]] = defaultdict(list)
        self._started: dict[str, float] = {}
        for name in (*self._blocks, *self._tail):
            self._watch(name, model.get_submodule(name))
        self._watch(_FORWARD, model)

    def times(self, times_more: float) -> DenoiserTimes:
        """Returns the times since the last `clear`. times_more: usual number of steps / number of steps made."""
        blocks_s = tuple(self._median_s(name) for name in self._blocks)
        tail_s = sum(self._median_s(name) for name in self._tail)
        head_s = max(0.0, self._median_s(_FORWARD) - sum(blocks_s) - tail_s)
        return DenoiserTimes(head_s, blocks_s, tail_s, round(len(self._seconds[_FORWARD]) * times_more))

    def clear(self) -> None:
        self._seconds.clear()

    def _median_s(self, name: str) -> float:
        return statistics.median(self._seconds[name]) if self._seconds[name] else 0.0

    def _watch(self, name: str, module: nn.Module) -> None:
        module.register_forward_pre_hook(lambda *_: self._start(name))
        module.register_forward_hook(lambda *_: self._stop(name))

    def _start(self, name: str) -> None:
        self._started[name] = _now()

    def _stop(self, name: str) -> None:
        self._seconds[name].append(_now() - self._started[name])


def _alone(config: Config) -> Config:
    """Returns the config with a whole GPU: torch's limit is per process, and this one runs all three stages."""
    num_gpus = 1 if 0 < config.num_gpus < 1 else config.num_gpus
    return config.model_copy(update={"num_gpus": num_gpus, "memory_limit_gib": None})


def _timed(stage: str, working: dict[str, int], run: Callable[[], Any]) -> tuple[Any, float]:
    """Returns (result, seconds). On a GPU it also stores in `working` by how many bytes memory rose at most."""
    device, before = accelerator.find_device(), 0
    if device is not None:
        accelerator.reset_peaks(device)
        before = accelerator.allocated_bytes(device)
    start = _now()
    result = run()
    seconds = _now() - start
    if device is not None:
        working[stage] = accelerator.peak_bytes(device)[0] - before
    return result, seconds


def _now() -> float:
    device = accelerator.find_device()
    if device is not None:
        accelerator.synchronize(device)
    return time.perf_counter()


def _raise(error: BaseException) -> None:
    raise error
