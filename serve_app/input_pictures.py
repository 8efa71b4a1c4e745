"""Pictures that go in, as clients send them: bounded by their headers before anybody decodes them.

Never fetched from a URL. What is behind a good header, the encode stage finds out (stages/pictures.py).
"""

import base64
import binascii
import re
import threading
import warnings
from functools import cache
from io import BytesIO
from typing import Any

# Registered by being imported: for what is none of these, Pillow would import all that it has.
from PIL import Image, JpegImagePlugin, PngImagePlugin, UnidentifiedImageError, WebPImagePlugin
from PIL.ExifTags import Base
from pydantic_core import PydanticCustomError

from deployments.request import InputPictures, MediaSize
from serve_app.config import LimitsConfig
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
"""Pixels: of less there is no latent, and no aspect to speak of."""
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
"""First bytes, in lower case where they are letters of a text, and of what."""
BRANDS = {b"ftyphei": "HEIC", b"ftypmif": "HEIC", b"ftypavi": "AVIF"}
"""From the fourth byte on."""
DATA_URL = re.compile(r"data:[^,;]*(?:;[^,;]*)*;base64,", re.IGNORECASE)
DATA_URL_FORM = "data:image/png;base64,…"
MISREAD = "picture"
"""The type of pydantic's error; what was sent is not repeated in it."""
_SIDEWAYS = frozenset({5, 6, 7, 8})
"""EXIF orientations that swap width and height."""
_one_at_a_time = threading.Lock()
"""What the texts of a PNG may unfold to, 64 MiB by Pillow's bound, is here once."""


def read_picture(value: Any) -> bytes:
    """A file's bytes, as they are or in a data URL. Raises PydanticCustomError."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, dict) and value.keys() == {"image_url"}:
        value = value["image_url"]  # OpenAI's other way to say it
    if not isinstance(value, str):
        raise _misread(f"send a file, or a data URL: {DATA_URL_FORM}")
    if value[:8].lower().startswith(("http:", "https:")):
        raise _misread(f"pictures are never fetched: send the file itself, or its data URL: {DATA_URL_FORM}")
    head = DATA_URL.match(value, 0, 200)
    if head is None:
        raise _misread(f"it is no file (in curl: -F image=@FILE) and no data URL, which begins {DATA_URL_FORM}")
    try:
        return base64.b64decode(value[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise _misread(f"its data URL is not base64: {error}") from error


def read_pictures(value: Any) -> tuple[bytes, ...]:
    """One, or a list of them. Raises PydanticCustomError."""
    if not isinstance(value, list | tuple):
        return (read_picture(value),)
    if not value:
        raise _misread("the list is empty")
    return tuple(map(read_picture, value))


def judge_pictures(pictures: InputPictures, limits: LimitsConfig) -> MediaSize:
    """The size of the first, or of the control picture. Raises BadRequest for any that is not to be decoded."""
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
                f"mask: it has {size} pixels, and the first image {sizes[0]}: they must be equal", "mask"
            )
    if pictures.control is not None:
        sizes.append(_judge(pictures.control, "control_image", "control_image: it", limits))
    return sizes[0]


def size_by_header(data: bytes) -> tuple[MediaSize, int]:
    """As it is shown, turned by its EXIF, and how many pictures it plays. Reads no pixels.

    Raises whatever Pillow's readers do.
    """
    with (
        _one_at_a_time,
        warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning),
        Image.open(BytesIO(data), formats=FORMATS) as image,
    ):
        # Not the reader's own, which for a PNG without any would decode the pixels.
        turned = Image.Image.getexif(image).get(Base.Orientation) in _SIDEWAYS
        width, height = reversed(image.size) if turned else image.size
        # Phones put more pictures behind a JPEG's own (MPO): no animation.
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
        raise refused(f"is {_looks_like(data)}: send a PNG, JPEG or WebP that is whole") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise refused(f"has more than {limits.max_image_pixels} pixels, the limit") from error
    except Exception as error:  # readers raise what they like
        raise refused(f"cannot be read: {quoted(str(error))}") from error
    if size.width * size.height > limits.max_image_pixels:
        raise refused(
            f"has {size}, {size.width * size.height} pixels; the limit is {limits.max_image_pixels} pixels"
        )
    if min(size.width, size.height) < MIN_SIDE:
        raise refused(f"has {size} pixels; the least is {MIN_SIDE} each way")
    if num_frames > 1:
        raise refused(f"is an animation of {num_frames} pictures: send one of them")
    return size


def _looks_like(data: bytes) -> str:
    start = data[:64].removeprefix(b"\xef\xbb\xbf").lstrip()
    for head, what in STARTS.items():
        if start.startswith(head) or start.lower().startswith(head):
            return what
    brand = next((name for brand, name in BRANDS.items() if start[4:].startswith(brand)), None)
    return f"an {brand} file" if brand else "no picture that can be read"


def _misread(why: str) -> PydanticCustomError:
    return PydanticCustomError(MISREAD, "{why}", {"why": why})


@cache
def blank_png() -> bytes:
    """A small one, for a request that is only judged."""
    file = BytesIO()
    Image.new("L", (MIN_SIDE, MIN_SIDE)).save(file, "PNG")
    return file.getvalue()
