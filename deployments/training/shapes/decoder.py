"""Trains the autoencoder's decoder on latents that the transformer drew, so that it corrects their small errors.

The encoder, and with it the latents that the transformer knows, stays as it is.
"""

import copy
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxPipeline
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from deployments.training.shapes.autoencoder import (
    State,
    learning_rate_factor,
    random_crops,
    random_scenes,
    to_pixels,
    to_tensor,
)
from deployments.training.shapes.plan import BASE_SIZE, Plan, Size
from deployments.training.shapes.scene import Scene, random_scene, render_scene
from deployments.training.shapes.sheet import GUIDANCE, NUM_STEPS, write_comparison
from deployments.training.shapes.text import MAX_SEQUENCE_LENGTH
from deployments.training.shapes.wording import describe

_STREAM, _DRAWING_STREAM = 7, 8
_NUM_SHEET = 16
_BATCH = 20
"""Drawings of one call of the pipeline."""
_WARMUP = 50


class DecoderTraining:
    """The last phase of training: the decoder, on drawings and on what the encoder makes of true images."""

    def __init__(self, plan: Plan, pipeline: FluxPipeline, drawings_file: Path) -> None:
        """pipeline: draws; it is not changed."""
        self._plan = plan
        self.num_steps = plan.num_decoder_steps
        self.vae: AutoencoderKL = copy.deepcopy(pipeline.vae).requires_grad_(False)
        self.vae.decoder.requires_grad_(True)
        self._drawings = _make_drawings(plan, pipeline, drawings_file)
        self._optimizer = torch.optim.AdamW(self.vae.decoder.parameters(), plan.decoder_lr, betas=(0.9, 0.99))

    def step(self, step: int) -> float:
        """One optimiser step; returns the mean absolute error, on the scale of -1 to 1."""
        rng = np.random.default_rng([self._plan.seed, _STREAM, step])
        latents, pictures = self._drawn(rng) if step % 2 else self._encoded(rng)
        decoded = self.vae.decode(latents).sample
        error = functional.l1_loss(decoded, pictures)
        loss = error + functional.mse_loss(decoded, pictures)
        self._optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.vae.decoder.parameters(), 1.0)
        for group in self._optimizer.param_groups:
            group["lr"] = self._plan.decoder_lr * learning_rate_factor(step, self.num_steps, _WARMUP)
        self._optimizer.step()
        return error.item()

    @torch.no_grad()
    def report(self, file: Path) -> str:
        """Writes drawings to `file`, below the true images; returns how far they differ."""
        count = min(_NUM_SHEET, self._plan.num_drawings)
        true = [
            render_scene(_drawing_scene(self._plan, BASE_SIZE, index)[0], *BASE_SIZE) for index in range(count)
        ]
        return write_comparison(true, to_pixels(self.vae.decode(self._drawings[BASE_SIZE][:count]).sample), file)

    def state_dict(self) -> State:
        return {"vae": self.vae.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: State) -> None:
        self.vae.load_state_dict(state["vae"])
        self._optimizer.load_state_dict(state["optimizer"])

    def _drawn(self, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Returns drawn latents and the images that they should be; every third time of another size."""
        sizes = (*self._plan.other_sizes, *[BASE_SIZE] * (2 * len(self._plan.other_sizes)))
        size = sizes[int(rng.integers(len(sizes)))]
        area = size[0] * size[1] / (BASE_SIZE[0] * BASE_SIZE[1])
        chosen = rng.integers(
            len(self._drawings[size]), size=max(1, round(2 * self._plan.autoencoder_batch / area))
        )
        scenes = [_drawing_scene(self._plan, size, int(index))[0] for index in chosen]
        return self._drawings[size][chosen], to_tensor([render_scene(scene, *size) for scene in scenes])

    @torch.no_grad()
    def _encoded(self, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        count = self._plan.autoencoder_batch
        pictures = to_tensor(random_scenes(rng, count) if rng.random() < 0.5 else random_crops(rng, 4 * count))
        noise = torch.Generator().manual_seed(int(rng.integers(2**62)))
        return self.vae.encode(pictures).latent_dist.sample(noise), pictures


def _drawing_scene(plan: Plan, size: Size, index: int) -> tuple[Scene, np.random.Generator]:
    """Returns the scene of one drawing, and the random generator of its prompt."""
    rng = np.random.default_rng([plan.seed, _DRAWING_STREAM, *size, index])
    return random_scene(rng, is_held_out=False), rng


@torch.no_grad()
def _make_drawings(plan: Plan, pipeline: FluxPipeline, file: Path) -> dict[Size, Tensor]:
    """Returns drawn latents `[N, 16, h, w]` per size, read from `file`, or else drawn and stored there."""
    counts = {BASE_SIZE: plan.num_drawings} | dict.fromkeys(plan.other_sizes, plan.num_other_drawings)
    if not file.exists():
        batches = [(size, start) for size, count in counts.items() for start in range(0, count, _BATCH)]
        drawn: dict[str, list[Tensor]] = {_name(size): [] for size in counts}
        for size, start in track(batches, "drawing scenes"):
            scenes = [
                _drawing_scene(plan, size, index) for index in range(start, min(start + _BATCH, counts[size]))
            ]
            prompts = [describe(scene, rng) for scene, rng in scenes]
            drawn[_name(size)].append(_draw(pipeline, prompts, size, seed=start))
        partial = file.with_suffix(".partial")
        save_file({name: torch.cat(parts).contiguous() for name, parts in drawn.items()}, partial)
        partial.rename(file)
    stored = load_file(file)
    return {size: stored[_name(size)] for size in counts}


def _draw(pipeline: FluxPipeline, prompts: list[str], size: Size, seed: int) -> Tensor:
    """Returns latents `[N, 16, h, w]` as the decoder takes them. Every other batch is drawn without guidance."""
    guidance = GUIDANCE if seed // _BATCH % 2 else 1.0
    packed = pipeline(
        prompts,
        width=size[0],
        height=size[1],
        num_inference_steps=NUM_STEPS,
        max_sequence_length=MAX_SEQUENCE_LENGTH,
        true_cfg_scale=guidance,
        negative_prompt=[""] * len(prompts),
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
    ).images
    latents = pipeline._unpack_latents(packed, size[1], size[0], pipeline.vae_scale_factor)
    config = pipeline.vae.config
    unscaled: Tensor = latents / config.scaling_factor + config.shift_factor
    return unscaled


def _name(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
