"""A body is judged in the thread that suits it: one with files takes longer than an event loop may stand still."""

import asyncio

from serve_app.input_videos import JUDGING_VIDEOS
from serve_app.openai_api import ImageBody, VideoBody
from serve_app.validation import Judged, Validator


async def judge(validator: Validator, body: ImageBody | VideoBody) -> Judged:
    """Raises BadRequest or UnknownModel."""
    pictures = body.pictures
    if pictures is None:
        return validator.judge(body)
    judging = None if pictures.video is None else JUDGING_VIDEOS
    return await asyncio.get_running_loop().run_in_executor(judging, validator.judge, body)
