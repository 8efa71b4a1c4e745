"""The size that a request asks for: explicit, or by its input image."""

import re
from dataclasses import dataclass
from math import log, sqrt

from deployments.families import Geometry
from deployments.request import MediaSize
from serve_app.errors import BadRequest, quoted

SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")
MAX_SIDE = {"jpeg": 65_500, "webp": 16_383, "mp4": 16_384}
"""Pixels. The limits of libjpeg, libwebp and x264 (16,384 is the maximum of H.264 level 6.2)."""


@dataclass(frozen=True)
class Sizes:
    """The sizes that one served model accepts."""

    geometry: Geometry
    default: MediaSize
    max_pixels: int
    max_num_frames: int

    def read(self, size: str, picture: MediaSize | None, output_format: str) -> tuple[int, int]:
        """Returns (width, height) of "WIDTHxHEIGHT" or "auto". Raises BadRequest.

        picture: size of the first input image; auto has its aspect ratio.
        """
        if size == "auto":
            width, height = (self.default.width, self.default.height) if picture is None else self.near(picture)
        else:
            match = SIZE.fullmatch(size)
            if match is None:
                raise BadRequest(f'size must be "WIDTHxHEIGHT" or "auto", got {quoted(size)}', "size")
            width, height = int(match[1]), int(match[2])
        if size != "auto" or picture is not None:
            self._check(width, height)
        _check_sides(width, height, output_format)
        return width, height

    def near(self, picture: MediaSize) -> tuple[int, int]:
        """Returns (width, height) in the image's aspect ratio: its own size, or no more pixels than the model
        draws by default.

        For a model with fixed sizes, returns the one with the nearest aspect ratio.
        """
        if self.geometry.sizes:
            shape = picture.width / picture.height
            width, height = min(self.geometry.sizes, key=lambda size: abs(log(size[0] / size[1] / shape)))
            return width, height
        most = min(self.default.width * self.default.height, self.max_pixels)
        scale = min(1.0, sqrt(most / (picture.width * picture.height)))
        if self.geometry.max_side is not None:
            scale = min(scale, self.geometry.max_side / max(picture.width, picture.height))
        sides, multiple = (picture.width * scale, picture.height * scale), self.geometry.size_multiple
        width, height = (max(1, round(side / multiple)) * multiple for side in sides)
        if width * height > most:
            width, height = (max(1, int(side / multiple)) * multiple for side in sides)
        return width, height

    def read_frames(self, num_frames: int | None, seconds: float | None, fps: int, given: MediaSize | None) -> int:
        """Returns the number of frames of a video. given: the input video, all of whose frames are used unless the
        request sets a number.

        Raises BadRequest.
        """
        multiple, limit, param = self.geometry.frame_multiple, self.max_num_frames, "num_frames"
        if num_frames is None and seconds is not None:
            param = "seconds"
            asked = round(seconds * fps)
            num_frames = round(seconds * fps / multiple) * multiple + 1 if given is None else self._fitting(asked)
        if num_frames is None and given is not None and given.num_frames > limit:
            raise BadRequest(
                f"input_reference: it has over {limit} frames, the limit: send num_frames to use fewer of them",
                "input_reference",
            )
        if num_frames is None:
            num_frames = self.default.num_frames if given is None else self._fitting(given.num_frames)
        if num_frames > limit:
            raise BadRequest(f"{param} asks for {quoted(num_frames)} frames; the limit is {limit}", param)
        if (num_frames - 1) % multiple:
            low = self._fitting(num_frames)
            raise BadRequest(
                f"num_frames must be 1 more than a multiple of {multiple}, got {num_frames}; "
                f"nearest: {low} or {low + multiple}",
                param,
            )
        if given is not None and num_frames > given.num_frames:
            raise BadRequest(f"{param} asks for {num_frames} frames; the video has {given.num_frames}", param)
        return num_frames

    def _fitting(self, num_frames: int) -> int:
        """Returns the largest number of frames, up to this one, that fills whole latent frames."""
        multiple = self.geometry.frame_multiple
        return max(0, num_frames - 1) // multiple * multiple + 1

    def _check(self, width: int, height: int) -> None:
        size, multiple, limit = f"{width}x{height}", self.geometry.size_multiple, self.max_pixels
        if self.geometry.sizes and [width, height] not in map(list, self.geometry.sizes):
            sizes = ", ".join(f"{w}x{h}" for w, h in self.geometry.sizes)
            raise BadRequest(f"size: this model draws {sizes}; got {size}", "size")
        if width % multiple or height % multiple:
            near = "x".join(str(max(multiple, round(v / multiple) * multiple)) for v in (width, height))
            raise BadRequest(
                f"size: width and height must be multiples of {multiple}, got {size}; nearest: {near}", "size"
            )
        most = self.geometry.max_side
        if most is not None and max(width, height) > most:
            raise BadRequest(f"size: this model draws at most {most} pixels each way, got {size}", "size")
        if width * height > limit:
            raise BadRequest(f"size: {size} has {width * height} pixels; the limit is {limit} pixels", "size")


def _check_sides(width: int, height: int, output_format: str) -> None:
    limit = MAX_SIDE.get(output_format)
    if limit is not None and max(width, height) > limit:
        instead = "" if output_format == "mp4" else "; use a smaller size, or output_format png"
        raise BadRequest(
            f"size: {width}x{height} is too long for output_format {output_format}, which allows at most "
            f"{limit} pixels a side{instead}",
            "size",
        )
