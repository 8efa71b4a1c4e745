"""Offloading by accelerate and diffusers: by model, by leaf, by group, to disk."""

import tempfile
import weakref
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import accelerate
import torch
from diffusers.hooks import apply_group_offloading
from torch import nn

from cluster.machines import accelerator
from deployments.memory.config import OffloadConfig
from deployments.memory.movable import make_movable


def offload(models: Iterable[nn.Module], config: OffloadConfig, device: torch.device) -> list[Any]:
    """Adds hooks to the models, in place, that bring weights to the device when they are needed.

    Returns accelerate's hooks of models that stay on the device until the hook's `offload()` is called.
    Raises ValueError if the device cannot do what config asks for.
    """
    if config.use_stream and device.type == "cpu":
        raise ValueError("offload.use_stream needs a GPU, and this stage runs on the CPU: leave it out")
    staying: list[Any] = []
    for model in models:
        if config.kind == "group" and config.folder is not None:
            _check_untied(model)
        if config.kind == "model":
            make_movable(model)
            _, hook = accelerate.cpu_offload_with_hook(model, device)
            staying.append(hook)
        elif config.kind == "sequential":
            accelerate.cpu_offload(model, device, offload_buffers=True)
        elif config.kind == "disk":
            accelerate.disk_offload(model, _folder(model, config.folder), device, offload_buffers=True)
        else:
            apply_group_offloading(
                model,
                onload_device=device,
                offload_type=f"{config.level}_level",
                num_blocks_per_group=config.blocks_per_group if config.level == "block" else None,
                non_blocking=config.non_blocking,
                use_stream=config.use_stream,
                record_stream=config.record_stream,
                low_cpu_mem_usage=config.low_cpu_memory,
                offload_to_disk_path=config.folder and _folder(model, config.folder),
                block_modules=_vae_blocks(model),
            )
    for hook in staying:
        others = [other for other in staying if other is not hook]
        if others:
            hook.model.register_forward_pre_hook(partial(_send_away, others, device), prepend=True)
    return staying


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _send_away(hooks: Sequence[Any], device: torch.device, *_: Any) -> None:
    """Offloads the other models, so that one at a time is on the device, whichever ran before.

    accelerate's hooks only offload one fixed predecessor, but requests may call two denoisers alternately.
    """
    there = [hook for hook in hooks if next(hook.model.parameters()).device != torch.device("cpu")]
    for hook in there:
        hook.offload()
    if there:
        accelerator.empty_cache(device)


def _check_untied(model: nn.Module) -> None:
    """Raises ValueError if two layers share a weight, as T5's embeddings do.

    diffusers writes such a weight to the files of both groups, the second time empty
    (`hooks/group_offloading.py`).
    """
    owners: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)].append(name)
    for names in owners.values():
        if len(names) > 1:
            raise ValueError(
                f"offload: group with a folder cannot keep {type(model).__name__}, whose {' and '.join(names)} "
                "are one weight: use offload: disk, or leave out the folder"
            )


def _vae_blocks(model: nn.Module) -> list[str] | None:
    """Returns the names of a VAE's blocks if its class does not list them; None for other models.

    Without them, hooks would be called at the VAE's forward, which is never called.
    """
    if not hasattr(model, "decoder") or hasattr(model, "_group_offload_block_modules"):
        return None
    return [name for name in ("quant_conv", "post_quant_conv", "encoder", "decoder") if hasattr(model, name)]


def _folder(model: nn.Module, parent: str | None) -> str:
    """Returns a new folder for one model, deleted together with the model.

    Models may not share a folder: group offloading would take files that it finds there for its own.
    """
    folder = tempfile.TemporaryDirectory(prefix="latent-relay-", dir=parent)
    weakref.finalize(model, folder.cleanup)
    return folder.name
