"""Limits of requests."""

from PIL import Image
from pydantic import Field

from cluster.config import Config


class LimitsConfig(Config):
    """What one request may ask for, and how many there may be at once."""

    max_pixels: int = Field(2048 * 2048, ge=64, description="width times height")
    max_num_inference_steps: int = Field(150, ge=1)
    max_megapixel_steps: float = Field(
        20_000.0,
        gt=0,
        description="cost of one request: width x height x frames x steps x n / 10⁶; a video of 1280x720, 121 "
        "frames and 50 steps is 5576",
    )
    max_prompt_characters: int = Field(
        4000, ge=1, description="characters of the prompt, and of the negative prompt"
    )
    max_num_frames: int = Field(161, ge=1, description="frames of a video")
    max_image_bytes: int = Field(20 * 2**20, ge=1024, description="file size of each input image")
    max_image_pixels: int = Field(
        25_000_000,
        ge=64 * 64,
        le=Image.MAX_IMAGE_PIXELS,
        description="pixels of each input image, and of each frame of an input video; the default allows photos "
        "of phones; a stage that opens it needs 3 bytes per pixel, 15 with transparency, 30 for a video",
    )
    max_video_bytes: int = Field(64 * 2**20, ge=1024, description="file size of an input video")
    max_concurrent_requests: int = Field(
        256, ge=1, description="requests in progress per ingress replica; one more gets a 429"
    )
    max_queue_s: float | None = Field(
        None,
        gt=0,
        description="seconds of work, as measured, that may be ahead of a request; if there is more, it gets a "
        "429; default: as much as lets the request meet its deadline",
    )
    request_timeout_s: float = Field(
        600.0,
        gt=0,
        description="from arrival to answer; a request that cannot meet it gets a 429, one that misses it a 504",
    )
