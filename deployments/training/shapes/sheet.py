"""Writes several images in rows as one image, with or without their prompts."""

import textwrap
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxPipeline
from PIL import Image, ImageDraw, ImageFont

from deployments.training.shapes.plan import BASE_SIZE
from deployments.training.shapes.scene import Pixels
from deployments.training.shapes.text import MAX_SEQUENCE_LENGTH

NUM_STEPS = 8
"""Denoising steps; more steps change little."""
GUIDANCE = 1.5
"""Guidance scale with an empty negative prompt; without guidance every tenth outline is of another shape."""
CONTACT_PROMPTS = (
    "a red circle on the left, on a white background",
    "a red circle and a blue square",
    "a yellow square and nothing else, on cyan",
    "left: a purple circle; right: a small green square; background: pink",
    "a small orange triangle above a black circle",
    "on the right a small red square, in the middle a tiny black triangle, on pink",
    "please paint a big green circle in the middle, the background is gray",
    "top: a little orange square; left: a little blue circle; cyan background",
)
_COMPARED = 8
"""Images per row of a comparison."""
_COLUMNS = 4
_CAPTION_HEIGHT = 54
_GAP = 8


def write_comparison(true: list[Pixels], made: list[Pixels], file: Path) -> str:
    """Writes rows of true images above generated ones, all of one size; returns how far they differ."""
    rows = []
    for start in range(0, len(true), _COMPARED):
        part = slice(start, start + _COMPARED)
        rows += [np.concatenate(true[part], axis=1), np.concatenate(made[part], axis=1)]
    Image.fromarray(np.concatenate(rows)).save(file)
    off = np.abs(np.stack(true).astype(float) - np.stack(made)).mean()
    return f"mean error {off:.2f} of 255: {file}"


def write_contact_sheet(checkpoint: Path, file: Path) -> None:
    """Writes the stored checkpoint's images for `CONTACT_PROMPTS`, with seeds 0, 1, 2, …, each above its text."""
    width, height = BASE_SIZE
    pipeline = FluxPipeline.from_pretrained(checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(
        list(CONTACT_PROMPTS),
        width=width,
        height=height,
        num_inference_steps=NUM_STEPS,
        max_sequence_length=MAX_SEQUENCE_LENGTH,
        true_cfg_scale=GUIDANCE,
        negative_prompt=[""] * len(CONTACT_PROMPTS),
        generator=[torch.Generator().manual_seed(seed) for seed in range(len(CONTACT_PROMPTS))],
    ).images
    cell = (width + _GAP, height + _CAPTION_HEIGHT)
    num_rows = -(-len(pictures) // _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * cell[0] + _GAP, num_rows * cell[1] + _GAP), (225, 225, 225))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for index, (picture, prompt) in enumerate(zip(pictures, CONTACT_PROMPTS, strict=True)):
        x, y = _GAP + index % _COLUMNS * cell[0], _GAP + index // _COLUMNS * cell[1]
        sheet.paste(picture, (x, y))
        draw.text((x, y + height + 3), textwrap.fill(prompt, 27), fill=(30, 30, 30), font=font, spacing=1)
    sheet.save(file, optimize=True)
