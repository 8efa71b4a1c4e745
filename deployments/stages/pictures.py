"""The pictures that go in, and the video: files to what pipelines take.

The frames of a video are read by the VAE alone: elsewhere grey ones stand for them.
"""

from collections.abc import Mapping
from io import BytesIO
from itertools import islice
from typing import Any

from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageOps
from PIL import _imaging as core

from deployments.families import Call
from deployments.refusal import WrongField
from deployments.request import InputPictures, MediaSize
from deployments.video_file import read_frames

FORMATS = ("PNG", "JPEG", "WEBP")
LEAST_SIDE = 64
"""Pixels of a picture that goes in; FLUX.2 takes no smaller one."""
core.set_block_size(64 * 2**20)
"""Of Pillow's buffers. Freed blocks of up to 32 MiB, as it has them, glibc keeps, and for each thread its own."""
_SIXTEEN_BITS = 257
"""A level of 16 bits to one of 8."""


def open_pictures(
    pictures: InputPictures | None, size: MediaSize | None = None, *, reads_video: bool = False
) -> dict[str, Any]:
    """`image` (a list), `mask_image`, `control_image` and `video` (a list), those that there are.

    size: of the request, which frames are made as large as, and as many, when they are read.

    Raises WrongField.
    """
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
    if pictures.video is not None:
        assert size is not None
        opened["video"] = _open_video(pictures.video, pictures.field, size) if reads_video else _blank_video(size)
    return opened


def blank_pictures(call: Call, asked: MediaSize) -> dict[str, Any]:
    """Grey ones of the size that is asked for, for a call that is tried."""
    size, opened = (max(LEAST_SIDE, asked.width), max(LEAST_SIDE, asked.height)), dict[str, Any]()
    if call.max_images:
        opened["image"] = [Image.new("RGB", size, "grey")]
    if "mask_image" in call.parameters:
        opened["mask_image"] = Image.new("L", size, "white")
    if call.control is not None:
        opened["control_image"] = Image.new("RGB", size, "grey")
    if call.takes_video:
        opened["video"] = _blank_video(asked)
    return opened


def picture_arguments(call: Call, pictures: Mapping[str, Any], size: tuple[int, int] | None) -> dict[str, Any]:
    """Of the pipeline's call. size: of the request, (width, height).

    A picture that is drawn anew is made as large as what is asked for, by the filter of diffusers'
    VaeImageProcessor: some pipelines take its size for the request's. One that a video begins with is cut to that
    size, as by VaeImageProcessor, where the call takes no other. One that is only looked at keeps its own.
    """
    values: dict[str, Any] = dict(pictures)
    control = values.pop("control_image", None)
    if "image" in values:
        images = values["image"]
        if "strength" in call.parameters and size is not None:
            images = [_resized(image, size) for image in images]
            if "mask_image" in values:
                values["mask_image"] = _resized(values["mask_image"], size)
        elif "height" not in call.parameters and size is not None:
            images = [VaeImageProcessor().resize(image, size[1], size[0], resize_mode="crop") for image in images]
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


def _open_video(data: bytes, field: str, size: MediaSize) -> list[Image.Image]:
    """Its first frames, by the filter of diffusers' VideoProcessor: as plain diffusers would make them."""
    frames, sides = list[Image.Image](), (size.width, size.height)
    try:
        frames.extend(_resized(frame, sides) for frame in islice(read_frames(data), size.num_frames))
    except Exception as error:  # as above
        raise WrongField(f"its frame {len(frames) + 1} cannot be read: {error}", field) from error
    if len(frames) < size.num_frames:
        raise WrongField(
            f"{len(frames)} of its frames can be read, and {size.num_frames} are asked for: send num_frames, "
            "of those that there are",
            field,
        )
    return frames


def _blank_video(size: MediaSize) -> list[Image.Image]:
    return [Image.new("RGB", (size.width, size.height), "grey")] * size.num_frames


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
