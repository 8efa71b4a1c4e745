"""The pictures that go in: files to what pipelines take."""

from collections.abc import Mapping
from io import BytesIO
from typing import Any

from PIL import Image, ImageOps
from PIL import _imaging as core

from deployments.refusal import WrongField
from deployments.request import GenerationRequest, InputPictures

FORMATS = ("PNG", "JPEG", "WEBP")
core.set_block_size(64 * 2**20)
"""Of Pillow's buffers. Freed blocks of up to 32 MiB, as it has them, glibc keeps, and for each thread its own."""
LEAST_SIDE = 64
"""Pixels of a picture that goes in; FLUX.2 takes no smaller one."""
_SIXTEEN_BITS = 257
"""A level of 16 bits to one of 8."""


def open_pictures(pictures: InputPictures | None) -> dict[str, Any]:
    """`image` (a list) and `mask_image`, as a pipeline's call takes them. Raises WrongField."""
    if pictures is None:
        return {}
    images = [_flat(_open(data, pictures.field)) for data in pictures.images]
    opened: dict[str, Any] = {"image": images}
    if pictures.mask is not None:
        mask = _open(pictures.mask, "mask")
        if mask.size != images[0].size:
            raise WrongField(
                f"it has {_in_words(mask)}, and the first image {_in_words(images[0])}: they must be equal", "mask"
            )
        opened["mask_image"] = _drawn_anew(mask)
    return opened


def blank_pictures(request: GenerationRequest) -> dict[str, Any]:
    """Grey ones of the size that is asked for, for a call that is tried; none for a kind that takes none."""
    if request.kind == "generate":
        return {}
    size = (max(LEAST_SIDE, request.width), max(LEAST_SIDE, request.height))
    opened: dict[str, Any] = {"image": [Image.new("RGB", size, "grey")]}
    if request.kind == "inpaint":
        opened["mask_image"] = Image.new("L", size, "white")
    return opened


def picture_arguments(
    pictures: Mapping[str, Any], request: GenerationRequest, parameters: frozenset[str], *, takes_several: bool
) -> dict[str, Any]:
    """Of the pipeline's call.

    A picture that is drawn anew is made as large as what is asked for, by the filter of diffusers'
    VaeImageProcessor: some pipelines take its size for the request's. One that is only looked at keeps its own.
    """
    values: dict[str, Any] = dict(pictures)
    if "strength" in parameters and request.width is not None:
        size = (request.width, request.height)
        values["image"] = [_resized(image, size) for image in values["image"]]
        if "mask_image" in values:
            values["mask_image"] = _resized(values["mask_image"], size)
    if not takes_several:
        [values["image"]] = values["image"]
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
