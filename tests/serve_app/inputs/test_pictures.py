"""Tests that input images are checked by their headers alone, without being decoded."""

import zlib
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from deployments.request import InputPictures, MediaSize
from deployments.stages.pixels.pictures import open_pictures
from serve_app.config.limits import LimitsConfig
from serve_app.errors import BadRequest
from serve_app.inputs.pictures import validate_pictures
from tests.serve_app.pictures import chunk, file, noise, png_of

LIMITS = LimitsConfig(max_image_bytes=2**20)
ZEROS = zlib.compress(bytes(2**24), 9)
"""16 MiB of zeros, compressed to 16 KiB."""


def validate(*images: bytes, mask: bytes | None = None) -> MediaSize:
    return validate_pictures(InputPictures(images, mask), LIMITS)


@pytest.fixture(autouse=True)
def nobody_decodes(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    def load(self: Any) -> Any:
        raise AssertionError("pixels were read")

    if "opened" not in request.fixturenames:
        monkeypatch.setattr(ImageFile.ImageFile, "load", load)


def frames(kind: str) -> bytes:
    buffer = BytesIO()
    noise().save(buffer, kind, save_all=True, append_images=[noise(1), noise(2)])
    return buffer.getvalue()


JPEG = file(noise(), "JPEG")
HOSTILE: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "it is empty"),
    "long": (bytes(2**20 + 1), "it has 1048577 bytes; the limit is 1048576"),
    "1x1": (file(noise(size=(1, 1))), "it has 1x1 pixels; the minimum is 16 each way"),
    "thin": (file(noise(size=(15, 4000))), "it has 15x4000 pixels; the minimum is 16"),
    "20000x20000": (png_of(20_000, 20_000), "it has more than 25000000 pixels"),
    "8000x8000": (png_of(8_000, 8_000), "it has 8000x8000, 64000000 pixels; the limit is 25000000"),
    "2**31": (png_of(2**31 - 1, 2**31 - 1), "it has more than 25000000 pixels"),
    "gif": (file(noise(), "GIF"), "it is a GIF: send a complete PNG, JPEG or WebP"),
    "bmp": (file(noise(), "BMP"), "it is a BMP"),
    "tiff": (file(noise(), "TIFF"), "it is a TIFF"),
    "svg": (b"\n<svg xmlns='http://www.w3.org/2000/svg'/>", "it is an SVG"),
    "xml": (b'<?xml version="1.0"?><svg/>', "it is XML, perhaps an SVG"),
    "pdf": (b"%PDF-1.7\n", "it is a PDF"),
    "html": (b"\xef\xbb\xbf<!DOCTYPE html><html>", "it is an HTML page"),
    "heic": (b"\0\0\0\x18ftypheic" + bytes(16), "it is an HEIC file"),
    "text": (b"a cat", "it is not an image that can be read"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "it is not an image that can be read"),
    "animated png": (frames("PNG"), "it is an animation of 3 images"),
    "animated webp": (frames("WEBP"), "it is an animation of 3 images"),
    "half a header": (file(noise())[:20], "it "),
    "half a jpeg header": (JPEG[:100], "it "),
    "half a webp header": (file(noise(), "WEBP")[:24], "it "),
    "text bomb": (png_of(64, 64, chunk(b"zTXt", b"Comment\0\0" + ZEROS)), "it cannot be read"),
    "text bombs": (
        png_of(64, 64, *[chunk(b"zTXt", b"C\0\0" + zlib.compress(bytes(2**20), 9))] * 100),
        "it cannot",
    ),
    "profile bomb": (png_of(64, 64, chunk(b"iTXt", b"C\0\1\0\0\0" + ZEROS)), "it cannot be read"),
}


@pytest.mark.parametrize(("data", "told"), HOSTILE.values(), ids=HOSTILE)
def test_what_is_not_to_be_decoded_is_refused_with_the_reason(data: bytes, told: str) -> None:
    with pytest.raises(BadRequest) as refused:
        validate(data)
    assert refused.value.param == "image"
    assert refused.value.message.startswith(f"image: {told}")
    assert len(refused.value.message) < 250


def test_of_several_the_wrong_one_is_counted() -> None:
    with pytest.raises(BadRequest, match="image: number 2 of 3 is a GIF"):
        validate(file(noise()), HOSTILE["gif"][0], file(noise()))


def test_a_mask_must_be_as_large_as_the_first_image() -> None:
    assert validate(file(noise()), file(noise(size=(32, 32))), mask=file(noise(1))) == MediaSize(64, 64)
    with pytest.raises(BadRequest, match="mask: it has 32x64 pixels, but the first image has 64x64") as refused:
        validate(file(noise()), mask=file(noise(size=(32, 64))))
    assert refused.value.param == "mask"


def turned(orientation: int, kind: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return file(noise(size=(64, 32)), kind, exif=exif)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_has_the_size_in_which_it_is_shown(orientation: int, kind: str) -> None:
    assert validate(turned(orientation, kind)) == (MediaSize(32, 64) if orientation > 4 else MediaSize(64, 32))


def test_a_bomb_behind_a_good_header_costs_nothing_here() -> None:
    assert validate(png_of(64, 64, chunk(b"IDAT", ZEROS))) == MediaSize(64, 64)


@pytest.fixture
def opened() -> Any:
    """Returns a function that decodes a file as the stages do."""
    return lambda data: open_pictures(InputPictures((data,)))["image"][0]


def grey16() -> Image.Image:
    return Image.fromarray(np.full((64, 64), 128 * 257, np.uint16))


def palette() -> bytes:
    """A palette image whose left half is red and whose right half is transparent."""
    image = Image.new("P", (64, 64), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (32, 0, 64, 64))
    return file(image, transparency=1)


def phones() -> bytes:
    """A JPEG with a second image behind it, as phones write (MPO)."""
    buffer = BytesIO()
    noise().save(buffer, "MPO", save_all=True, append_images=[noise(1, (16, 16))])
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "left", "right"),
    [
        (file(Image.new("CMYK", (64, 64), (0, 255, 255, 0)), "JPEG", quality=100), (254, 0, 0), (254, 0, 0)),
        (file(grey16()), (128, 128, 128), (128, 128, 128)),
        (palette(), (255, 0, 0), (255, 255, 255)),
        (file(Image.new("LA", (64, 64), (0, 0))), (255, 255, 255), (255, 255, 255)),
        (file(Image.new("1", (64, 64), 1)), (255, 255, 255), (255, 255, 255)),
        (file(Image.new("L", (64, 64), 7)), (7, 7, 7), (7, 7, 7)),
        (file(Image.new("RGBA", (64, 64), (0, 0, 0, 0)), "WEBP"), (255, 255, 255), (255, 255, 255)),
    ],
    ids=["CMYK", "16 bit", "palette", "transparent", "1 bit", "grey", "transparent webp"],
)
def test_every_kind_of_pixel_is_a_right_picture(
    data: bytes, left: tuple[int, ...], right: tuple[int, ...], opened: Any
) -> None:
    assert validate(data) == MediaSize(64, 64)
    picture = opened(data)
    assert picture.mode == "RGB"
    assert np.abs(np.subtract(picture.getpixel((4, 4)), left)).max() <= 1
    assert np.abs(np.subtract(picture.getpixel((60, 4)), right)).max() <= 1


def test_of_a_phones_picture_with_more_behind_it_the_first_is_taken(opened: Any) -> None:
    assert validate(phones()) == MediaSize(64, 64)
    assert opened(phones()).size == (64, 64)
