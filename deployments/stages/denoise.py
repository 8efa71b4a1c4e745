"""Noise to latents: diffusers' own pipeline call, driven over a stand-in for its denoiser.

Every request runs in a thread of its own, on a shallow copy of the pipeline with a scheduler of its own
(schedulers keep their state in themselves). So every scheduler and guidance mode of diffusers works, and the
result is the pipeline's by construction.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import torch

from deployments.checkpoints.components import fetch_stage
from deployments.config import ModelConfig, TransformerConfig
from deployments.device import resolve_device, resolve_dtype
from deployments.engine.blocks import build_skeleton
from deployments.engine.engine import Engine
from deployments.engine.shard import load_shard
from deployments.engine.stand_in import StandIn
from deployments.engine.step_queue import Seat
from deployments.families import FAMILIES
from deployments.families.family import Embeds
from deployments.request import GenerationRequest
from deployments.stages.pipeline import load_pipeline

OnStep = Callable[[int, torch.Tensor], None]
"""(steps done, latents after them)"""


class Denoising:
    """The checkpoint's denoiser, its scheduler, and the loop around them. Thread-safe."""

    def __init__(self, model: ModelConfig, family: str, config: TransformerConfig) -> None:
        torch.set_num_threads(config.num_threads)
        self._family = FAMILIES[family]
        self._device, self._dtype = resolve_device(config), resolve_dtype(config.dtype)
        folder, index = fetch_stage(model, self._family, "denoise")
        self._pipe = load_pipeline(
            folder, index, frozenset({"scheduler"}), dtype=self._dtype, variant=model.variant
        )
        name = self._family.denoiser
        model_class = getattr(diffusers, index[name][1])
        self._skeleton = build_skeleton(model_class, folder, name)
        shard = load_shard(model_class, folder, name, blocks=None, dtype=self._dtype, variant=model.variant)
        shard.model.to(self._device).eval()
        self._engine = Engine(shard, config)

    def join(self) -> Seat:
        """A seat for one request; `leave` frees it."""
        return self._engine.queue.join()

    def leave(self, seat: Seat) -> None:
        """Ends the request: if it still runs, its thread gets Cancelled at the next step."""
        self._engine.queue.leave(seat)

    @torch.no_grad()
    def denoise(self, seat: Seat, embeds: Embeds, request: GenerationRequest, on_step: OnStep) -> torch.Tensor:
        """The latents as the pipeline returns them, on the CPU. Blocks; raises Cancelled."""

        def after_step(_pipe: Any, index: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            on_step(index + 1, tensors["latents"])
            return {}

        latents: torch.Tensor = self._pipeline(seat)(
            **{name: self._place(value) for name, value in embeds.items()},
            **self._family.call(request),
            height=request.height,
            width=request.width,
            num_inference_steps=request.num_inference_steps,
            generator=torch.Generator("cpu").manual_seed(request.seed),
            output_type="latent",
            return_dict=False,
            callback_on_step_end=after_step,
        )[0]
        return latents.cpu().contiguous()

    def _pipeline(self, seat: Seat) -> Any:
        """A copy of the pipeline that is this request's own, down to the scheduler, but for the weights."""
        pipe = copy.copy(self._pipe)
        pipe.scheduler = copy.deepcopy(self._pipe.scheduler)
        stand_in = StandIn(
            self._skeleton,
            dtype=self._dtype,
            device=self._device,
            submit=partial(self._engine.forward, seat),
        )
        setattr(pipe, self._family.denoiser, stand_in)
        return pipe

    def _place(self, value: torch.Tensor | None) -> torch.Tensor | None:
        """On the denoiser's device; embeddings in its dtype, masks in their own."""
        if value is None:
            return None
        return value.to(self._device, self._dtype if value.is_floating_point() else value.dtype)
