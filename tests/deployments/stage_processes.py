"""The three stages, each in an operating-system process of its own; what crosses is pickled, as in the real hop.

Imports no torch: in those processes loading a stage does, as in a replica.
"""

import pickle
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np

from deployments.config import EncoderConfig, ModelConfig, StageConfig, TransformerConfig, VaeConfig
from deployments.request import GenerationRequest, InputPictures
from deployments.stages import load_stage
from deployments.stages.media import Sound

CONFIGS: Mapping[str, StageConfig] = {
    "encode": EncoderConfig(),
    "denoise": TransformerConfig(),
    "decode": VaeConfig(),
}


class StageProcesses:
    """Each process keeps the stage of the model that it was last asked for."""

    def __init__(self) -> None:
        spawn = get_context("spawn")
        self._processes = {stage: ProcessPoolExecutor(1, spawn) for stage in CONFIGS}

    def draw(
        self, model: ModelConfig, request: GenerationRequest, pictures: InputPictures | None = None
    ) -> tuple[np.ndarray, Sound | None]:
        """([F, H, W, 3], its sound). pictures: that go in."""
        of, asked, shown = (pickle.dumps(each) for each in (model, request, pictures))
        for stage, process in self._processes.items():
            process.submit(_load, stage, of)  # side by side

        def ask(stage: str, method: str, *given: bytes) -> bytes:
            return self._processes[stage].submit(_answer, stage, of, method, *given).result()

        encodings = ask("encode", "encode", asked, shown)
        nothing = pickle.dumps(())
        posteriors = nothing if pictures is None else ask("decode", "prepare", encodings, asked, shown)
        arguments = ask("denoise", "denoise", encodings, asked, posteriors, shown)
        frames = pickle.loads(ask("decode", "decode", arguments, asked))
        heard = pickle.loads(arguments).sound
        sound = heard and pickle.loads(ask("decode", "decode_sound", pickle.dumps(heard)))
        return frames, sound

    def end(self) -> None:
        for process in self._processes.values():
            process.shutdown()


_kept: dict[bytes, Any] = {}
"""By its model, the one stage of this process."""


def _load(stage: str, model: bytes) -> None:
    if model in _kept:
        return
    for other in _kept.values():
        if stage == "denoise":
            other.close()
    _kept.clear()
    made: Any = load_stage(stage, pickle.loads(model), CONFIGS[stage])  # type: ignore[call-overload]
    if stage == "denoise":
        made.connect(None, _raise)
    _kept[model] = made


def _answer(stage: str, model: bytes, method: str, *given: bytes) -> bytes:
    _load(stage, model)
    return pickle.dumps(_run(_kept[model], method, *map(pickle.loads, given)))


def _run(stage: Any, method: str, *given: Any) -> Any:
    if method != "denoise":
        return getattr(stage, method)(*given)
    encodings, request, posteriors, pictures = given
    seat = stage.join()
    try:
        return stage.denoise(seat, encodings, request, posteriors=posteriors, pictures=pictures)
    finally:
        stage.leave(seat)


def _raise(error: BaseException) -> None:
    raise error
