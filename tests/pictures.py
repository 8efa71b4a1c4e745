"""Pictures and masks to put in."""

from io import BytesIO

import numpy as np
from PIL import Image


def picture(seed: int = 0, side: int = 64) -> Image.Image:
    """Noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8))


def half_mask(side: int = 64) -> Image.Image:
    """White, which is drawn anew, on the right."""
    return Image.fromarray(np.uint8(np.arange(side)[None].repeat(side, 0) > side // 2) * 255)


def png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
