"""Names of the tiny checkpoints. Imports no torch."""

from collections.abc import Mapping

TINY_FAMILIES = ("flux", "sd15", "sdxl", "sd3", "qwen-image", "wan")
"""One for each family in `FAMILIES`, large enough for quantisation and shards (tiny/families.py)."""

_NAMES = {
    "families": TINY_FAMILIES,
    "flux": (
        "flux-kontext",
        "flux-fill",
        "flux2",
        "flux2-klein",
        "chroma",
        "bria",
        "bria-fibo",
        "ovis",
        "longcat",
        "hidream",
        "aura-flow",
        "hunyuan-image",
    ),
    "flux3": ("flux3", "flux3-distilled"),
    "images": (
        "z-image",
        "ideogram4",
        "lumina2",
        "lumina",
        "krea2",
        "ernie",
        "sana",
        "sana-sprint",
        "prx",
        "cogview4",
    ),
    "earlier_images": (
        "sd35",
        "sd15-inpaint",
        "lcm",
        "pixart-alpha",
        "pixart-sigma",
        "cogview3",
        "hunyuan-dit",
        "kandinsky5",
    ),
    "controlnets": ("sd15-controlnet", "sdxl-controlnet", "flux-controlnet"),
    "qwen_edit": ("qwen-image-edit", "qwen-image-edit-plus"),
    "wan": ("wan22-a14b", "wan22-5b", "wan21-i2v", "wan22-i2v", "lucy-edit", "skyreels2"),
    "ltx": ("ltx-video", "ltx-video-i2v", "ltx2", "ltx2-i2v"),
    "kandinsky6": ("kandinsky6",),
    "videos": (
        "hunyuan-video",
        "hunyuan-video15",
        "hunyuan-video15-i2v",
        "cogvideox",
        "mochi",
        "sana-video",
        "kandinsky5-video",
        "latte",
        "animatediff",
        "animatediff-sdxl",
    ),
}

TINY_MODULES: Mapping[str, str] = {name: module for module, names in _NAMES.items() for name in names}
"""Module of this package by checkpoint name; its builder's name is `build_` and the checkpoint's name."""
