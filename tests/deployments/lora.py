"""LoRA adapters with random weights, written by PEFT and diffusers as trainers write them."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from deployments.checkpoints.components import denoiser_names, read_index

LAYERS = r".*(to_q|to_k|to_v|to_out\.0|net\.0\.proj|net\.2|proj_mlp|proj_in|conv1|ffn\.net\.2)"
"""Names of the layers that adapters change: linear ones, and the convolutions of models that have any."""


def write_lora(
    folder: Path, checkpoint: Path, *, seed: int, rank: int = 4, texts: bool = False, layers: str = LAYERS
) -> Path:
    """Writes an adapter for the first denoiser.

    texts: whether it is for the text encoders too, where diffusers supports that.
    """
    pipe: Any = DiffusionPipeline.from_pretrained(checkpoint)
    [denoiser, *_] = denoiser_names(read_index(checkpoint))
    torch.manual_seed(seed)
    written = {f"{denoiser}_lora_layers": _add(getattr(pipe, denoiser), layers, rank)}
    for name in ("text_encoder", "text_encoder_2") if texts else ():
        if name in pipe._lora_loadable_modules:
            written[f"{name}_lora_layers"] = _add(getattr(pipe, name), r".*(q_proj|v_proj|fc1)", rank)
    type(pipe).save_lora_weights(folder, **written)
    return folder


def load_with(checkpoint: Path, adapters: Mapping[str, Path]) -> Any:
    """Returns the plain pipeline, with these adapters loaded by PEFT."""
    pipe: Any = DiffusionPipeline.from_pretrained(checkpoint)
    pipe.set_progress_bar_config(disable=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        for name, source in adapters.items():
            pipe.load_lora_weights(source, adapter_name=name)
    return pipe


def _add(model: Any, layers: str, rank: int) -> dict[str, torch.Tensor]:
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights=False, target_modules=layers))
    weights: dict[str, torch.Tensor] = get_peft_model_state_dict(model)
    return weights
