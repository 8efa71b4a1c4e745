"""A video that goes in, as a client sends it: judged before a stage opens it, by a process that may fail for it.

Its bytes are bounded here, before that process sees them. What is behind its first frame, the decode stage finds
out (stages/pictures.py).
"""

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache

from deployments.request import MediaSize
from serve_app.config import LimitsConfig
from serve_app.errors import BadRequest

COMMAND = (sys.executable, "-m", "deployments.video_file")
"""Imports PyAV, which the ingress does without."""
MUST_END_IN_S = 30.0
BROKE_OFF = "cannot be read: its reader broke off. Send an MP4 or WebM that is whole"
JUDGING_VIDEOS = ThreadPoolExecutor(1, "judge videos")
"""For bodies with a video, which wait here for each other, and nobody else for them."""
_one_at_a_time = threading.Lock()
"""What one may take of memory is taken once, by Python handles too."""


def judge_video(data: bytes, field: str, limits: LimitsConfig) -> tuple[MediaSize, int | None]:
    """Its size, with the frames that may be used of it or one more, and its frames a second, if it says.

    Raises BadRequest where it is not to be opened.
    """
    if len(data) > limits.max_video_bytes:
        raise BadRequest(f"{field}: it has {len(data)} bytes; the limit is {limits.max_video_bytes}", field)
    arguments = ("judge", str(limits.max_image_pixels), str(limits.max_num_frames))
    try:
        with _one_at_a_time:
            judged = _run(*arguments, given=data)
    except subprocess.TimeoutExpired as error:
        raise BadRequest(
            f"{field}: it cannot be read within {MUST_END_IN_S:g} s: send a shorter one", field
        ) from error
    if judged.returncode:
        lines = judged.stderr.decode(errors="replace").strip().splitlines()
        why = lines[-1] if judged.returncode == 1 and lines else BROKE_OFF
        raise BadRequest(f"{field}: it {why}", field)
    facts = json.loads(judged.stdout)
    fps = facts.pop("fps")
    return MediaSize(**facts), fps


@cache
def blank_video(num_frames: int) -> bytes:
    """A small one, for a request that is only judged."""
    made = _run("blank", str(num_frames), given=b"")
    made.check_returncode()
    return made.stdout


def _run(*arguments: str, given: bytes) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(
        (*COMMAND, *arguments), input=given, capture_output=True, timeout=MUST_END_IN_S, check=False
    )
