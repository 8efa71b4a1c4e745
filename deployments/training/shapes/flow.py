"""Trains the transformer by rectified flow, on latents that are encoded once, with text encoders already trained.

It has several phases (`Plan.flow_phases`): the layout is decided at high noise, and the outlines at lower noise.
"""

import copy
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from deployments.training.shapes.autoencoder import State, learning_rate_factor, to_tensor
from deployments.training.shapes.models import VAE_FACTOR
from deployments.training.shapes.plan import BASE_SIZE, FlowPhase, Plan, Size
from deployments.training.shapes.reading import ReadingTraining
from deployments.training.shapes.scene import Scene, random_scene, render_scene
from deployments.training.shapes.sheet import write_comparison
from deployments.training.shapes.text import MAX_SEQUENCE_LENGTH
from deployments.training.shapes.wording import describe, describe_unseen

_STREAM, _POOL_STREAM, _SHEET_STREAM = 2, 3, 4
_TEXT_LENGTHS = (*[MAX_SEQUENCE_LENGTH] * 4, 64, 128, 512)
_EMPTY_SHARE = 0.03
"""Share of empty prompts, so that guidance with an empty negative prompt works."""
_TIME_STD = 1.2
"""Standard deviation of the logit-normal timesteps (arXiv 2403.03206)."""
_WARMUP = 150
_EMA_DECAY = 0.999
_SHIFT = 1.5


class FlowTraining:
    """One training phase of the transformer. Its result, also used for samples, is the average of the weights."""

    def __init__(
        self,
        plan: Plan,
        phase: FlowPhase,
        transformer: FluxTransformer2DModel,
        vae: AutoencoderKL,
        reading: ReadingTraining,
        pool_file: Path,
    ) -> None:
        """transformer: has the initial weights; it is not changed."""
        self._plan, self._phase = plan, phase
        self.num_steps = phase.num_steps
        self.vae = vae.eval().requires_grad_(False)
        self._pool = _make_pool(plan, vae, pool_file)
        base = self._pool[BASE_SIZE]
        vae.register_to_config(shift_factor=base.mean().item(), scaling_factor=1 / base.std().item())
        self._clip_tokenizer, self._t5_tokenizer = reading.clip_tokenizer, reading.t5_tokenizer
        self._clip = reading.clip.eval().requires_grad_(False)
        self._t5 = reading.t5.eval().requires_grad_(False)
        self._live = copy.deepcopy(transformer).requires_grad_(True).train()
        self.average = copy.deepcopy(self._live).eval().requires_grad_(False)
        self._optimizer = torch.optim.AdamW(
            self._live.parameters(), phase.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )

    def step(self, step: int) -> float:
        """One optimiser step; returns the mean squared error of the velocity."""
        rng = np.random.default_rng([self._plan.seed, _STREAM, self._plan.flow_phases.index(self._phase), step])
        size, text_length = self._choose_shape(step, rng)
        num_tokens = text_length + size[0] * size[1] // (2 * VAE_FACTOR) ** 2
        chosen = rng.integers(len(self._pool[size]), size=max(1, self._plan.tokens_per_step // num_tokens))
        prompts = [describe(_pool_scene(self._plan, size, int(index)), rng) for index in chosen]
        prompts = ["" if rng.random() < _EMPTY_SHARE else prompt for prompt in prompts]
        latents = (self._pool[size][chosen] - self.vae.config.shift_factor) * self.vae.config.scaling_factor
        loss = self._loss(latents, prompts, text_length, int(rng.integers(2**62)))
        self._optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self._live.parameters(), 1.0)
        for group in self._optimizer.param_groups:
            group["lr"] = self._phase.lr * learning_rate_factor(step, self.num_steps, _WARMUP)
        self._optimizer.step()
        self._update_average(step)
        return loss.item()

    def pipeline(self) -> FluxPipeline:
        """Returns a pipeline with the averaged weights in float32, which it shares with this training."""
        pipeline = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=False, shift=_SHIFT),
            vae=self.vae,
            tokenizer=self._clip_tokenizer,
            tokenizer_2=self._t5_tokenizer,
            text_encoder=self._clip,
            text_encoder_2=self._t5,
            transformer=self.average,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def report(self, file: Path) -> str:
        """Writes images of unseen scenes in unseen wordings to `file`, below the true images."""
        rng = np.random.default_rng([self._plan.seed, _SHEET_STREAM])
        scenes = [random_scene(rng, is_held_out=True) for _ in range(self._plan.num_sheet_prompts)]
        drawn = self.pipeline()(
            [describe_unseen(scene, rng) for scene in scenes],
            width=BASE_SIZE[0],
            height=BASE_SIZE[1],
            num_inference_steps=self._plan.sample_steps,
            max_sequence_length=MAX_SEQUENCE_LENGTH,
            generator=torch.Generator().manual_seed(self._plan.seed),
            output_type="np",
        ).images
        true = [render_scene(scene, *BASE_SIZE) for scene in scenes]
        return write_comparison(true, [np.rint(picture * 255).astype(np.uint8) for picture in drawn], file)

    def state_dict(self) -> State:
        return {
            "live": self._live.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        self._live.load_state_dict(state["live"])
        self.average.load_state_dict(state["average"])
        self._optimizer.load_state_dict(state["optimizer"])

    def _choose_shape(self, step: int, rng: np.random.Generator) -> tuple[Size, int]:
        if step < self._phase.num_base_steps or rng.random() > self._phase.other_share:
            return BASE_SIZE, MAX_SEQUENCE_LENGTH
        sizes = (BASE_SIZE, *self._plan.other_sizes)
        return sizes[int(rng.integers(len(sizes)))], int(rng.choice(_TEXT_LENGTHS))

    def _loss(self, latents: Tensor, prompts: list[str], text_length: int, seed: int) -> Tensor:
        """Returns the loss of one batch of normalised latents [B, 16, h, w]."""
        batch, channels, height, width = latents.shape
        generator = torch.Generator().manual_seed(seed)
        clean = FluxPipeline._pack_latents(latents, batch, channels, height, width)
        noise = torch.randn(clean.shape, generator=generator)
        sigmas = torch.sigmoid(torch.randn(batch, generator=generator) * _TIME_STD + self._phase.time_mean)
        mixed = torch.lerp(clean, noise, sigmas[:, None, None])
        clip_ids = self._clip_tokenizer(prompts, padding=True, truncation=True, return_tensors="pt").input_ids
        t5_ids = self._t5_tokenizer(
            prompts, padding="max_length", max_length=text_length, truncation=True, return_tensors="pt"
        ).input_ids
        velocity = self._live(
            hidden_states=mixed,
            timestep=sigmas,
            pooled_projections=self._clip(clip_ids).pooler_output,
            encoder_hidden_states=self._t5(t5_ids).last_hidden_state,
            txt_ids=torch.zeros(text_length, 3),
            img_ids=FluxPipeline._prepare_latent_image_ids(
                batch, height // 2, width // 2, torch.device("cpu"), torch.float32
            ),
            return_dict=False,
        )[0]
        return functional.mse_loss(velocity, noise - clean)

    @torch.no_grad()
    def _update_average(self, step: int) -> None:
        weight = 1 - min(_EMA_DECAY, (1 + step) / (10 + step))
        averages: list[Tensor] = list(self.average.parameters())
        values: list[Tensor] = list(self._live.parameters())
        torch._foreach_lerp_(averages, values, weight)


def _pool_scene(plan: Plan, size: Size, index: int) -> Scene:
    """Returns the scene of one image of the pool."""
    return random_scene(np.random.default_rng([plan.seed, _POOL_STREAM, *size, index]), is_held_out=False)


@torch.no_grad()
def _make_pool(plan: Plan, vae: AutoencoderKL, pool_file: Path) -> dict[Size, Tensor]:
    """Returns latents `[N, 16, h, w]` per size, read from `pool_file`, or else encoded and stored there."""
    counts = {BASE_SIZE: plan.num_scenes} | dict.fromkeys(plan.other_sizes, plan.num_other_scenes)
    if not pool_file.exists():
        batches = [(size, start) for size, count in counts.items() for start in range(0, count, 20)]
        encoded: dict[str, list[Tensor]] = {_pool_name(size): [] for size in counts}
        for size, start in track(batches, "encoding scenes"):
            indices = range(start, min(start + 20, counts[size]))
            pictures = [render_scene(_pool_scene(plan, size, index), *size) for index in indices]
            encoded[_pool_name(size)].append(vae.encode(to_tensor(pictures)).latent_dist.mode())
        partial = pool_file.with_suffix(".partial")
        save_file({name: torch.cat(parts).contiguous() for name, parts in encoded.items()}, partial)
        partial.rename(pool_file)
    stored = load_file(pool_file)
    return {size: stored[_pool_name(size)] for size in counts}


def _pool_name(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
