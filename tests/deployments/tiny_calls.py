"""Arguments of each tiny pipeline's call besides the prompt: 64 px, 2 steps, and what its small size needs."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from deployments.checkpoints.tiny.names import TINY_FAMILIES

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
MASK = Image.fromarray(np.uint8(np.arange(64)[None].repeat(64, 0) > 30) * 255)

_IMAGE = {"height": 64, "width": 64, "num_inference_steps": 2}
_VIDEO = _IMAGE | {"num_frames": 5}
FILM = [Image.fromarray(np.roll(np.asarray(PICTURE), i, 1)) for i in range(5)]
_GUIDED = {"negative_prompt": "blurry"}
_EXACT = {"use_resolution_binning": False}
_LTX2 = _VIDEO | {"height": 128, "width": 128, "num_frames": 9, "max_sequence_length": 32}

TINY_CALLS: Mapping[str, Mapping[str, Any]] = {
    **{name: (_VIDEO if name == "wan" else _IMAGE) | _GUIDED for name in TINY_FAMILIES},
    "flux": _IMAGE | {"max_sequence_length": 32},
    "flux-kontext": _IMAGE | {"image": PICTURE, "_auto_resize": False, "max_area": 64 * 64},
    "flux-fill": _IMAGE | {"image": PICTURE, "mask_image": MASK},
    "flux2": _IMAGE | {"max_sequence_length": 32},
    "flux2-klein": _IMAGE | {"max_sequence_length": 32},
    "flux3": _IMAGE | _GUIDED,
    "flux3-distilled": _IMAGE,
    "chroma": _IMAGE | _GUIDED | {"max_sequence_length": 32},
    "bria": _IMAGE | _GUIDED,
    "bria-fibo": _IMAGE | _GUIDED,
    "ovis": _IMAGE | _GUIDED,
    "longcat": _IMAGE | _GUIDED | {"enable_prompt_rewrite": False},
    "hidream": _IMAGE | _GUIDED,
    "aura-flow": _IMAGE | _GUIDED,
    "hunyuan-image": _IMAGE | _GUIDED,
    "z-image": _IMAGE | _GUIDED,
    "ideogram4": _IMAGE | {"guidance_scale": 4.0, "guidance_schedule": None, "max_sequence_length": 128},
    "lumina2": _IMAGE | _GUIDED,
    "lumina": _IMAGE | _GUIDED,
    "krea2": _IMAGE | _GUIDED,
    "ernie": _IMAGE | _GUIDED | {"use_pe": False},
    "sana": _IMAGE | _GUIDED | _EXACT,
    "sana-sprint": _IMAGE | _EXACT,
    "prx": _IMAGE | _GUIDED | _EXACT,
    "cogview4": _IMAGE | _GUIDED,
    "sd35": _IMAGE | _GUIDED,
    "sd15-inpaint": _IMAGE | _GUIDED | {"image": PICTURE, "mask_image": MASK},
    "lcm": _IMAGE,
    "pixart-alpha": _IMAGE | _GUIDED | _EXACT,
    "pixart-sigma": _IMAGE | _GUIDED | _EXACT,
    "cogview3": _IMAGE | _GUIDED,
    "hunyuan-dit": _IMAGE | _GUIDED | _EXACT,
    "kandinsky5": _IMAGE | _GUIDED,
    "sd15-controlnet": _IMAGE | _GUIDED | {"image": PICTURE},
    "sdxl-controlnet": _IMAGE | _GUIDED | {"image": PICTURE},
    "flux-controlnet": _IMAGE | {"control_image": PICTURE, "max_sequence_length": 32},
    "qwen-image-edit": _IMAGE | _GUIDED | {"image": PICTURE},
    "qwen-image-edit-plus": _IMAGE | _GUIDED | {"image": [PICTURE, PICTURE]},
    "wan22-a14b": _VIDEO | _GUIDED,
    "wan22-5b": _VIDEO | _GUIDED,
    "wan21-i2v": _VIDEO | _GUIDED | {"image": PICTURE},
    "wan22-i2v": _VIDEO | _GUIDED | {"image": PICTURE},
    "lucy-edit": _VIDEO | _GUIDED | {"video": FILM},
    "skyreels2": _VIDEO | _GUIDED,
    "ltx-video": _VIDEO | _GUIDED | {"num_frames": 9},
    "ltx-video-i2v": _VIDEO | _GUIDED | {"num_frames": 9, "image": PICTURE},
    "ltx2": _LTX2,
    "ltx2-i2v": _LTX2 | {"image": PICTURE},
    "hunyuan-video": _VIDEO,
    "hunyuan-video15": _VIDEO | _GUIDED,
    "hunyuan-video15-i2v": {"image": PICTURE, "num_frames": 5, "num_inference_steps": 2} | _GUIDED,
    "cogvideox": _VIDEO | _GUIDED | {"num_frames": 9},
    "mochi": _VIDEO | {"num_frames": 7, "max_sequence_length": 16},
    "sana-video": _IMAGE | _GUIDED | _EXACT | {"frames": 5},
    "kandinsky5-video": _VIDEO | _GUIDED,
    "kandinsky6": _VIDEO | _GUIDED | {"image": PICTURE, "max_sequence_length": 32},
    "latte": _IMAGE | _GUIDED | {"video_length": 16},
    "animatediff": _IMAGE | _GUIDED | {"num_frames": 2},
    "animatediff-sdxl": _IMAGE | _GUIDED | {"num_frames": 2},
}
