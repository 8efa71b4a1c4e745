"""The torch side of each stage: what runs in a replica's threads.

Modules in reading order: pipeline (one stage's components of a checkpoint), stub, call (the pipeline's own call,
of which each stage runs its part), modular (pipelines made of blocks); then encode with `texts`, denoise with
`loop`, worker_rank (the other ranks), decode with `pixels`. `trials` are calls that compute nothing. warm_up,
imports and preload belong to the start; finite and faults explain failures; stats has the figures that a stage
reports.
Importing this package imports no torch; `load_stage` does, when a replica calls it.
"""

import importlib
import warnings
from socket import socket
from typing import TYPE_CHECKING, Any, Literal, overload

from cluster.ranks.store_address import StoreAddress
from deployments.checkpoints.components import Stage
from deployments.checkpoints.integrity import check_stage
from deployments.config.encoder import EncoderConfig
from deployments.config.model import ModelConfig
from deployments.config.stage import StageConfig
from deployments.config.transformer import TransformerConfig
from deployments.config.vae import VaeConfig
from deployments.stages.imports import silence_imports, skip_unneeded

if TYPE_CHECKING:
    from deployments.stages.decode import Decoding
    from deployments.stages.denoise import Denoising
    from deployments.stages.encode import TextEncoding
    from deployments.stages.worker_rank import WorkerRank

STAGES = {
    "encode": "deployments.stages.encode:TextEncoding",
    "denoise": "deployments.stages.denoise:Denoising",
    "worker": "deployments.stages.worker_rank:WorkerRank",
    "decode": "deployments.stages.decode:Decoding",
}


@overload
def load_stage(
    stage: Literal["encode"],
    model: ModelConfig,
    config: EncoderConfig,
    owner: "tuple[ModelConfig, TextEncoding] | None" = None,
    /,
) -> "TextEncoding": ...
@overload
def load_stage(
    stage: Literal["denoise"], model: ModelConfig, config: TransformerConfig, listening: socket | None = None, /
) -> "Denoising": ...
@overload
def load_stage(
    stage: Literal["worker"],
    model: ModelConfig,
    config: TransformerConfig,
    rank: int,
    store: StoreAddress | None = None,
    /,
) -> "WorkerRank": ...
@overload
def load_stage(
    stage: Literal["decode"],
    model: ModelConfig,
    config: VaeConfig,
    owner: "tuple[ModelConfig, Decoding] | None" = None,
    /,
) -> "Decoding": ...


def load_stage(stage: str, model: ModelConfig, config: StageConfig, *args: Any) -> Any:
    """Builds a stage by name. Its module is imported only here, after the replica has done everything of Ray.

    Exceptions of torch, diffusers and transformers get a note, which Python prints last: the checkpoint, the stage
    and the first line of the message. Raises BrokenCheckpoint before anything is imported.
    """
    checkpoint_stage: Stage = "denoise" if stage == "worker" else stage  # type: ignore[assignment]
    check_stage(model, checkpoint_stage, config)
    try:
        return _load(stage, model, config, *args)
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        if first != str(error) or not isinstance(error, ValueError) or model.checkpoint not in first:
            error.add_note(f"{model.checkpoint}, {checkpoint_stage} stage: {type(error).__name__}: {first}")
        raise


def _load(stage: str, model: ModelConfig, config: StageConfig, *args: Any) -> Any:
    # Ray gives this warning in every process that sends tensors. PYTHONWARNINGS cannot silence it, because
    # importing Ray puts Ray's own filter first.
    warnings.filterwarnings("ignore", "Zero-copy tensor serialization")
    silence_imports()
    skip_unneeded(model, config)
    module, _, name = STAGES[stage].partition(":")
    return getattr(importlib.import_module(module), name)(model, config, *args)
