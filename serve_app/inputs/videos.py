"""An input video as a client sends it: validated before a stage opens it, in a subprocess that may crash.

The size of the file is checked before that process reads it. Faults after the first frame are found by the decode
stage (stages/pixels/pictures.py).
"""

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache

from deployments.request import MediaSize
from serve_app.config.limits import LimitsConfig
from serve_app.errors import BadRequest

COMMAND = (sys.executable, "-m", "deployments.media.video_file")
"""Imports PyAV, which the ingress does not."""
MUST_END_IN_S = 30.0
BROKE_OFF = "cannot be read: its reader crashed. Send a complete MP4 or WebM"
VIDEO_VALIDATION = ThreadPoolExecutor(1, "validate videos")
"""One thread for bodies with a video, so that these wait for each other and no other request waits for them."""
_one_at_a_time = threading.Lock()
"""Ensures that the memory for validating a video is used only once, also by Python handles."""


def validate_video(data: bytes, field: str, limits: LimitsConfig) -> tuple[MediaSize, int | None]:
    """Returns the video's size, with the number of usable frames or one more, and its frame rate, if the file
    states it.

    Raises BadRequest if the video must not be opened.
    """
    if len(data) > limits.max_video_bytes:
        raise BadRequest(f"{field}: it has {len(data)} bytes; the limit is {limits.max_video_bytes}", field)
    arguments = ("validate", str(limits.max_image_pixels), str(limits.max_num_frames))
    try:
        with _one_at_a_time:
            validated = _run(*arguments, given=data)
    except subprocess.TimeoutExpired as error:
        raise BadRequest(
            f"{field}: it could not be read within {MUST_END_IN_S:g} s: send a shorter one", field
        ) from error
    if validated.returncode:
        lines = validated.stderr.decode(errors="replace").strip().splitlines()
        why = lines[-1] if validated.returncode == 1 and lines else BROKE_OFF
        raise BadRequest(f"{field}: it {why}", field)
    facts = json.loads(validated.stdout)
    fps = facts.pop("fps")
    return MediaSize(**facts), fps


@cache
def blank_video(num_frames: int) -> bytes:
    """Returns a small video, for a request that is only validated."""
    made = _run("blank", str(num_frames), given=b"")
    made.check_returncode()
    return made.stdout


def _run(*arguments: str, given: bytes) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(
        (*COMMAND, *arguments), input=given, capture_output=True, timeout=MUST_END_IN_S, check=False
    )
