"""The pictures that go in: files to what pipelines take."""

from collections.abc import Mapping
from io import BytesIO
from typing import Any

from PIL import Image, ImageOps
from PIL import _imaging as core

from deployments.families import Call
from deployments.refusal import WrongField
from deployments.request import InputPictures

FORMATS = ("PNG", "JPEG", "WEBP")
LEAST_SIDE = 64
"""Pixels of a picture that goes in; FLUX.2 takes no smaller one."""
core.set_block_size(64 * 2**20)
"""Of Pillow's buffers. Freed blocks of up to 32 MiB, as it has them, glibc keeps, and for each thread its own."""
_SIXTEEN_BITS = 257
"""A level of 16 bits to one of 8."""


def open_pictures(pictures: InputPictures | None) -> dict[str, Any]:
    """`image` (a list), `mask_image` and `control_image`, those that there are. Raises WrongField."""
    if pictures is None:
        return {}
    opened: dict[str, Any] = {}
    if pictures.images:
        opened["image"] = [_flat(_open(data, pictures.field)) for data in pictures.images]
    if pictures.mask is not None:
        mask, first = _open(pictures.mask, "mask"), opened["image"][0]
        if mask.size != first.size:
            raise WrongField(
                f"it has {_in_words(mask)}, and the first image {_in_words(first)}: they must be equal", "mask"
            )
        opened["mask_image"] = _drawn_anew(mask)
    if pictures.control is not None:
        opened["control_image"] = _flat(_open(pictures.control, "control_image"))
    return opened


def blank_pictures(call: Call, width: int, height: int) -> dict[str, Any]:
    """Grey ones of the size that is asked for, for a call that is tried."""
    size, opened = (max(LEAST_SIDE, width), max(LEAST_SIDE, height)), dict[str, Any]()
    if call.max_images:
        opened["image"] = [Image.new("RGB", size, "grey")]
    if "mask_image" in call.parameters:
        opened["mask_image"] = Image.new("L", size, "white")
    if call.control is not None:
        opened["control_image"] = Image.new("RGB", size, "grey")
    return opened


def picture_arguments(call: Call, pictures: Mapping[str, Any], size: tuple[int, int] | None) -> dict[str, Any]:
    """Of the pipeline's call. size: of the request, (width, height).

    A picture that is drawn anew is made as large as what is asked for, by the filter of diffusers'
    VaeImageProcessor: some pipelines take its size for the request's. One that is only looked at keeps its own.
    """
    values: dict[str, Any] = dict(pictures)
    control = values.pop("control_image", None)
    if "image" in values:
        images = values["image"]
        if "strength" in call.parameters and size is not None:
            images = [_resized(image, size) for image in images]
            if "mask_image" in values:
                values["mask_image"] = _resized(values["mask_image"], size)
        values["image"] = images if call.max_images > 1 else images[0]
    if call.control is not None and control is not None:
        values[call.control] = control
    return values


def _open(data: bytes, field: str) -> Image.Image:
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except Exception as error:  # decoders raise what they like
        raise WrongField(f"it cannot be read: {error}", field) from error


def _flat(image: Image.Image) -> Image.Image:
    """RGB; what is transparent shows white."""
    image = _eight_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    over = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")


def _drawn_anew(mask: Image.Image) -> Image.Image:
    """[H, W] grey levels, 255 where the picture is to be drawn anew: as diffusers takes it."""
    mask = _eight_bits(mask)
    if mask.has_transparency_data:
        return ImageOps.invert(mask.convert("RGBA").getchannel("A"))
    return mask.convert("L")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Pillow cuts off what is above 255, where it has more bits."""
    if image.mode.startswith("I"):
        return image.convert("I").point(lambda level: level * (1 / _SIXTEEN_BITS)).convert("L")
    return image


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def _in_words(image: Image.Image) -> str:
    return f"{image.width}x{image.height} pixels"
