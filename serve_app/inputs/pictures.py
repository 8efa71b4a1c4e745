"""Input images as clients send them: checked by their headers before they are decoded.

They are never fetched from a URL. Faults after a valid header are found by the encode stage
(stages/pixels/pictures.py).
"""

import base64
import binascii
import re
import threading
import warnings
from functools import cache
from io import BytesIO
from typing import Any

# Importing registers these formats; for unknown data Pillow would import all others.
from PIL import Image, JpegImagePlugin, PngImagePlugin, UnidentifiedImageError, WebPImagePlugin
from PIL.ExifTags import Base
from pydantic_core import PydanticCustomError

from deployments.request import InputPictures, MediaSize
from serve_app.config.limits import LimitsConfig
from serve_app.errors import BadRequest, quoted

FORMATS = tuple(
    plugin.format
    for plugin in (
        PngImagePlugin.PngImageFile,
        JpegImagePlugin.JpegImageFile,
        WebPImagePlugin.WebPImageFile,
    )
)
MIN_SIDE = 16
"""Pixels: a smaller image has no latents and no useful aspect ratio."""
STARTS = {
    b"GIF8": "a GIF",
    b"BM": "a BMP",
    b"II*\0": "a TIFF",
    b"MM\0*": "a TIFF",
    b"%PDF": "a PDF",
    b"<svg": "an SVG",
    b"<?xml": "XML, perhaps an SVG",
    b"<!doc": "an HTML page",
    b"<html": "an HTML page",
    b"\0\0\1\0": "an icon",
    b"8BPS": "a Photoshop file",
}
"""First bytes of other file formats, and their names; text formats are matched in lower case."""
BRANDS = {b"ftyphei": "HEIC", b"ftypmif": "HEIC", b"ftypavi": "AVIF"}
"""Brands of ISO media files, which follow their first four bytes."""
DATA_URL = re.compile(r"data:[^,;]*(?:;[^,;]*)*;base64,", re.IGNORECASE)
DATA_URL_FORM = "data:image/png;base64,…"
MISREAD = "picture"
"""Type of the pydantic error, whose message does not repeat the input."""
_SIDEWAYS = frozenset({5, 6, 7, 8})
"""EXIF orientations that swap width and height."""
_one_at_a_time = threading.Lock()
"""Ensures that the expanded text of only one PNG, up to 64 MiB by Pillow's limit, is in memory at a time."""


def read_picture(value: Any) -> bytes:
    """Returns a file's bytes, given as they are or in a data URL. Raises PydanticCustomError."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, dict) and value.keys() == {"image_url"}:
        value = value["image_url"]  # OpenAI's other form
    if not isinstance(value, str):
        raise _misread(f"send a file, or a data URL: {DATA_URL_FORM}")
    if value[:8].lower().startswith(("http:", "https:")):
        raise _misread(f"images are never fetched: send the file itself, or its data URL: {DATA_URL_FORM}")
    head = DATA_URL.match(value, 0, 200)
    if head is None:
        raise _misread(
            f"it is neither a file (in curl: -F image=@FILE) nor a data URL, which begins {DATA_URL_FORM}"
        )
    try:
        return base64.b64decode(value[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise _misread(f"its data URL is not base64: {error}") from error


def read_pictures(value: Any) -> tuple[bytes, ...]:
    """Returns one image or a list of them. Raises PydanticCustomError."""
    if not isinstance(value, list | tuple):
        return (read_picture(value),)
    if not value:
        raise _misread("the list is empty")
    return tuple(map(read_picture, value))


def validate_pictures(pictures: InputPictures, limits: LimitsConfig) -> MediaSize:
    """Returns the size of the first image, or of the control image. Raises BadRequest for any that must not be
    decoded."""
    images, mask, field = pictures.images, pictures.mask, pictures.field
    several = len(images) > 1
    sizes = [
        _judge(data, field, f"{field}: number {i} of {len(images)}" if several else f"{field}: it", limits)
        for i, data in enumerate(images, 1)
    ]
    if mask is not None:
        size = _judge(mask, "mask", "mask: it", limits)
        if size != sizes[0]:
            raise BadRequest(
                f"mask: it has {size} pixels, but the first image has {sizes[0]}: they must be equal", "mask"
            )
    if pictures.control is not None:
        sizes.append(_judge(pictures.control, "control_image", "control_image: it", limits))
    return sizes[0]


def size_by_header(data: bytes) -> tuple[MediaSize, int]:
    """Returns the displayed size, rotated by its EXIF, and the number of frames. Reads no pixels.

    Raises whatever Pillow's readers raise.
    """
    with (
        _one_at_a_time,
        warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning),
        Image.open(BytesIO(data), formats=FORMATS) as image,
    ):
        # Not the reader's own getexif, which would decode the pixels of a PNG without EXIF.
        turned = Image.Image.getexif(image).get(Base.Orientation) in _SIDEWAYS
        width, height = reversed(image.size) if turned else image.size
        # Phones append further images to a JPEG (MPO), which are no animation.
        num_frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        return MediaSize(width, height), num_frames


def _judge(data: bytes, field: str, it: str, limits: LimitsConfig) -> MediaSize:
    def refused(why: str) -> BadRequest:
        return BadRequest(f"{it} {why}", field)

    if not data:
        raise refused("is empty")
    if len(data) > limits.max_image_bytes:
        raise refused(f"has {len(data)} bytes; the limit is {limits.max_image_bytes}")
    try:
        size, num_frames = size_by_header(data)
    except UnidentifiedImageError as error:
        raise refused(f"is {_looks_like(data)}: send a complete PNG, JPEG or WebP") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise refused(f"has more than {limits.max_image_pixels} pixels, the limit") from error
    except Exception as error:  # readers raise arbitrary errors
        raise refused(f"cannot be read: {quoted(str(error))}") from error
    if size.width * size.height > limits.max_image_pixels:
        raise refused(
            f"has {size}, {size.width * size.height} pixels; the limit is {limits.max_image_pixels} pixels"
        )
    if min(size.width, size.height) < MIN_SIDE:
        raise refused(f"has {size} pixels; the minimum is {MIN_SIDE} each way")
    if num_frames > 1:
        raise refused(f"is an animation of {num_frames} images: send one of them")
    return size


def _looks_like(data: bytes) -> str:
    start = data[:64].removeprefix(b"\xef\xbb\xbf").lstrip()
    for head, what in STARTS.items():
        if start.startswith(head) or start.lower().startswith(head):
            return what
    brand = next((name for brand, name in BRANDS.items() if start[4:].startswith(brand)), None)
    return f"an {brand} file" if brand else "not an image that can be read"


def _misread(why: str) -> PydanticCustomError:
    return PydanticCustomError(MISREAD, "{why}", {"why": why})


@cache
def blank_png() -> bytes:
    """Returns a small image, for a request that is only validated."""
    file = BytesIO()
    Image.new("L", (MIN_SIDE, MIN_SIDE)).save(file, "PNG")
    return file.getvalue()
