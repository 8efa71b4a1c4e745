"""Opens the files of input images and videos, as pipelines take them.

Only the VAE needs the frames of a video; elsewhere grey frames replace them.
"""

from collections.abc import Mapping
from io import BytesIO
from itertools import islice
from typing import Any

from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageOps
from PIL import _imaging as core

from deployments.errors import WrongField
from deployments.families import Call
from deployments.media.video_file import read_frames
from deployments.request import InputPictures, MediaSize

FORMATS = ("PNG", "JPEG", "WEBP")
LEAST_SIDE = 64
"""Least side of an input image, in pixels: FLUX.2 takes no smaller one."""
core.set_block_size(64 * 2**20)
"""Block size of Pillow's buffers. glibc keeps freed blocks of up to 32 MiB, separately for each thread, and
Pillow's default is below that."""
_SIXTEEN_BITS = 257
"""Ratio of a 16-bit level to an 8-bit one."""


def open_pictures(
    pictures: InputPictures | None, size: MediaSize | None = None, *, reads_video: bool = False
) -> dict[str, Any]:
    """Returns `image` (a list), `mask_image`, `control_image` and `video` (a list), those that the request has.

    Args:
        size: the request's size and number of frames, to which a video is read.
        reads_video: whether to read a video's frames; otherwise they are grey.

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
                f"it has {_in_words(mask)}, but the first image has {_in_words(first)}: they must be equal", "mask"
            )
        opened["mask_image"] = _drawn_anew(mask)
    if pictures.control is not None:
        opened["control_image"] = _flat(_open(pictures.control, "control_image"))
    if pictures.video is not None:
        assert size is not None
        opened["video"] = _open_video(pictures.video, pictures.field, size) if reads_video else _blank_video(size)
    return opened


def blank_pictures(call: Call, asked: MediaSize) -> dict[str, Any]:
    """Returns grey images of the requested size, for a trial call."""
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
    """Returns the arguments of a pipeline's call for images. size: the request's, (width, height).

    An image that is drawn anew is resized to the request's size, by the filter of diffusers' VaeImageProcessor,
    because some pipelines take its size for the request's. An image that a video begins with is cropped to that
    size, as by VaeImageProcessor, if the call takes no size. A reference image keeps its own size.
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
    except Exception as error:  # decoders may raise anything
        raise WrongField(f"it cannot be read: {error}", field) from error


def _open_video(data: bytes, field: str, size: MediaSize) -> list[Image.Image]:
    """Returns a video's first frames, resized by the filter of diffusers' VideoProcessor as in plain diffusers."""
    frames, sides = list[Image.Image](), (size.width, size.height)
    try:
        frames.extend(_resized(frame, sides) for frame in islice(read_frames(data), size.num_frames))
    except Exception as error:  # as above
        raise WrongField(f"its frame {len(frames) + 1} cannot be read: {error}", field) from error
    if len(frames) < size.num_frames:
        raise WrongField(
            f"only {len(frames)} of its frames can be read, but {size.num_frames} are asked for: set "
            f"num_frames to {len(frames)} or fewer",
            field,
        )
    return frames


def _blank_video(size: MediaSize) -> list[Image.Image]:
    return [Image.new("RGB", (size.width, size.height), "grey")] * size.num_frames


def _flat(image: Image.Image) -> Image.Image:
    """Converts an image to RGB; transparent pixels become white."""
    image = _eight_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    over = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")


def _drawn_anew(mask: Image.Image) -> Image.Image:
    """Converts a mask to grey levels, 255 where the image is to be drawn anew, as diffusers takes it."""
    mask = _eight_bits(mask)
    if mask.has_transparency_data:
        return ImageOps.invert(mask.convert("RGBA").getchannel("A"))
    return mask.convert("L")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scales an image with more bits to 8 bits per level; Pillow itself would clip levels above 255."""
    if image.mode.startswith("I"):
        return image.convert("I").point(lambda level: level * (1 / _SIXTEEN_BITS)).convert("L")
    return image


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def _in_words(image: Image.Image) -> str:
    return f"{image.width}x{image.height} pixels"
