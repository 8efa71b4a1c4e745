"""Validates a body in a suitable thread: with files this takes longer than the event loop may be blocked."""

import asyncio

from serve_app.http.openai_requests import ImageBody, VideoBody
from serve_app.inputs.videos import VIDEO_VALIDATION
from serve_app.validation import ValidatedBody, Validator


async def validate_body(validator: Validator, body: ImageBody | VideoBody) -> ValidatedBody:
    """Validates the body. Raises BadRequest or UnknownModel."""
    pictures = body.pictures
    if pictures is None:
        return validator.validate(body)
    executor = None if pictures.video is None else VIDEO_VALIDATION
    return await asyncio.get_running_loop().run_in_executor(executor, validator.validate, body)
