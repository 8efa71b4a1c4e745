"""Runs the three stages in a process each; what passes between them is pickled, as between replicas."""

import pickle
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np

from deployments.config.encoder import EncoderConfig
from deployments.config.model import ModelConfig
from deployments.config.stage import StageConfig
from deployments.config.transformer import TransformerConfig
from deployments.config.vae import VaeConfig
from deployments.media.pixels import Sound
from deployments.request import GenerationRequest, InputPictures
from deployments.stages import load_stage
from tests.deployments.forked import forking

CONFIGS: Mapping[str, StageConfig] = {
    "encode": EncoderConfig(),
    "denoise": TransformerConfig(),
    "decode": VaeConfig(),
}


class StageProcesses:
    """A process for each stage; it keeps the stage of the model that it was last called for."""

    def __init__(self) -> None:
        context = forking()
        self._processes = {stage: ProcessPoolExecutor(1, context) for stage in CONFIGS}

    def draw(
        self, model: ModelConfig, request: GenerationRequest, pictures: InputPictures | None = None
    ) -> tuple[np.ndarray, Sound | None]:
        """Returns frames [F, H, W, 3] and their sound.

        pictures: input images.
        """
        of, asked, shown = (pickle.dumps(each) for each in (model, request, pictures))
        for stage, process in self._processes.items():
            process.submit(_load, stage, of)  # all three load at once

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
"""The one stage of this process, by its pickled model."""


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
