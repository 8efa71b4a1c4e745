"""Trains the autoencoder to reconstruct true scenes and crowded crops, until colours and edges are right."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from deployments.training.shapes.models import build_autoencoder
from deployments.training.shapes.plan import BASE_SIZE, Plan
from deployments.training.shapes.scene import (
    BACKGROUNDS,
    COLORS,
    SHAPES,
    Pixels,
    paint,
    random_scene,
    render_scene,
)
from deployments.training.shapes.sheet import write_comparison

State = dict[str, Any]
"""The state from which a phase can be resumed: plain values and tensors."""

_STREAM = 1
"""Random stream: every step draws from (seed, stream, step), so a resumed training sees the same data."""
_CROP = 64
_KL_WEIGHT = 1e-4
_WARMUP = 50


def to_tensor(pictures: list[Pixels]) -> Tensor:
    """Returns images as [B, 3, H, W] float32 in -1 to 1."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pixels(tensor: Tensor) -> list[Pixels]:
    """The inverse of `to_tensor`, clamped."""
    scaled = ((tensor.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return list(scaled.permute(0, 2, 3, 1).numpy())


class AutoencoderTraining:
    """The training phase of the autoencoder. `step` may be called for any step once its state is loaded."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.num_steps = plan.num_autoencoder_steps
        self.vae = build_autoencoder()
        self._optimizer = torch.optim.AdamW(self.vae.parameters(), plan.autoencoder_lr, betas=(0.9, 0.99))

    def step(self, step: int) -> float:
        """One optimiser step; returns the mean absolute error, on the scale of -1 to 1."""
        rng = np.random.default_rng([self._plan.seed, _STREAM, step])
        count = self._plan.autoencoder_batch
        pictures = to_tensor(random_scenes(rng, count) if step % 2 else random_crops(rng, 4 * count))
        noise = torch.Generator().manual_seed(int(rng.integers(2**62)))
        posterior = self.vae.encode(pictures).latent_dist
        decoded = self.vae.decode(posterior.sample(noise)).sample
        error = functional.l1_loss(decoded, pictures)
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        loss = error + functional.mse_loss(decoded, pictures) + _KL_WEIGHT * kl
        self._optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.vae.parameters(), 1.0)
        for group in self._optimizer.param_groups:
            group["lr"] = self._plan.autoencoder_lr * learning_rate_factor(step, self.num_steps, _WARMUP)
        self._optimizer.step()
        return error.item()

    @torch.no_grad()
    def report(self, file: Path) -> str:
        """Writes unseen scenes to `file`, with their reconstructions below; returns how far they differ."""
        rng = np.random.default_rng([self._plan.seed, _STREAM, 2**31])
        pictures = [render_scene(random_scene(rng, is_held_out=True), *BASE_SIZE, rng) for _ in range(8)]
        latents = self.vae.encode(to_tensor(pictures)).latent_dist.mode()
        return write_comparison(pictures, to_pixels(self.vae.decode(latents).sample), file)

    def state_dict(self) -> State:
        return {"vae": self.vae.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: State) -> None:
        self.vae.load_state_dict(state["vae"])
        self._optimizer.load_state_dict(state["optimizer"])


def random_scenes(rng: np.random.Generator, count: int) -> list[Pixels]:
    """Returns images of scenes, each shape a little off its place and size."""
    return [render_scene(random_scene(rng, is_held_out=False), *BASE_SIZE, rng) for _ in range(count)]


def random_crops(rng: np.random.Generator, count: int) -> list[Pixels]:
    """Returns crowded images of a quarter of a scene's area: up to four shapes that overlap, in any colours."""
    palette = [*COLORS.values(), *BACKGROUNDS.values()]
    crops = []
    for _ in range(count):
        shapes = [
            (
                SHAPES[int(rng.integers(len(SHAPES)))],
                palette[int(rng.integers(len(palette)))],
                *rng.uniform(0, _CROP, 2),
                rng.uniform(9, 28),
            )
            for _ in range(int(rng.integers(1, 5)))
        ]
        crops.append(paint(shapes, palette[int(rng.integers(len(palette)))], _CROP, _CROP))
    return crops


def learning_rate_factor(step: int, num_steps: int, warmup: int) -> float:
    """Returns the factor of the rate: linear warm-up, flat for 3/10 of the steps, then linearly to almost 0."""
    return min(1.0, (step + 1) / warmup, (1 - step / num_steps) / 0.7)
