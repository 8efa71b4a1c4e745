"""The torch side of each stage: what runs in a replica's threads.

Read in this order: imports, preload, pipeline (one stage's components of a checkpoint), stub, call (the
pipeline's own, of which each stage does its part), encoding_methods, modular (pipelines made of blocks), decodes
(where a call ends), lockstep, encoder_forwards, truncation, weighting, encode, pictures, schedulers, denoise,
blank, trial (a call with zeros), steps, draws, follow (on the other ranks), tiles, decode, finite, media; then
derive (what a pipeline without an entry tells of itself).
Importing this package imports no torch; `load_stage` does, when a replica calls it.
"""

import importlib
import warnings
from socket import socket
from typing import TYPE_CHECKING, Any, Literal, overload

from cluster.meeting import MeetingPoint
from deployments.checkpoints.components import Stage
from deployments.checkpoints.integrity import check_stage
from deployments.config import EncoderConfig, ModelConfig, StageConfig, TransformerConfig, VaeConfig
from deployments.stages.imports import silence_imports, skip_unneeded

if TYPE_CHECKING:
    from deployments.stages.decode import Decoding
    from deployments.stages.denoise import Denoising
    from deployments.stages.encode import TextEncoding
    from deployments.stages.follow import Following

STAGES = {
    "encode": "deployments.stages.encode:TextEncoding",
    "denoise": "deployments.stages.denoise:Denoising",
    "follow": "deployments.stages.follow:Following",
    "decode": "deployments.stages.decode:Decoding",
}


@overload
def load_stage(
    stage: Literal["encode"],
    model: ModelConfig,
    config: EncoderConfig,
    holder: "tuple[ModelConfig, TextEncoding] | None" = None,
    /,
) -> "TextEncoding": ...
@overload
def load_stage(
    stage: Literal["denoise"], model: ModelConfig, config: TransformerConfig, listening: socket | None = None, /
) -> "Denoising": ...
@overload
def load_stage(
    stage: Literal["follow"],
    model: ModelConfig,
    config: TransformerConfig,
    rank: int,
    meeting: MeetingPoint | None = None,
    /,
) -> "Following": ...
@overload
def load_stage(
    stage: Literal["decode"],
    model: ModelConfig,
    config: VaeConfig,
    holder: "tuple[ModelConfig, Decoding] | None" = None,
    /,
) -> "Decoding": ...


def load_stage(stage: str, model: ModelConfig, config: StageConfig, *args: Any) -> Any:
    """Build a stage by name. Looked up late: a replica does everything of Ray before it imports torch.

    What torch, diffusers and transformers raise gets a note, which Python prints last: which checkpoint and stage
    it was, and of several lines the first. Raises BrokenCheckpoint before anything is imported.
    """
    checkpoint_stage: Stage = "denoise" if stage == "follow" else stage  # type: ignore[assignment]
    check_stage(model, checkpoint_stage, config)
    try:
        return _load(stage, model, config, *args)
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        if first != str(error) or not isinstance(error, ValueError) or model.checkpoint not in first:
            error.add_note(f"{model.checkpoint}, {checkpoint_stage} stage: {type(error).__name__}: {first}")
        raise


def _load(stage: str, model: ModelConfig, config: StageConfig, *args: Any) -> Any:
    # Ray's, of every process that sends tensors: importing Ray puts its own filter before PYTHONWARNINGS.
    warnings.filterwarnings("ignore", "Zero-copy tensor serialization")
    silence_imports()
    skip_unneeded(model, config)
    module, _, name = STAGES[stage].partition(":")
    return getattr(importlib.import_module(module), name)(model, config, *args)
