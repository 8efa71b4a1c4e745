"""Which requests are to meet in one replica of the encoder. Imports no torch."""

import hashlib

from deployments.request import GenerationRequest, InputPictures

_SAMPLE = 1024
"""Bytes of each picture: its last ones, which depend on all of it in what is compressed."""


def encoder_session(request: GenerationRequest, pictures: InputPictures | None = None) -> str:
    """Equal, in every process, for requests of which the encoder remembers the same; of others it may be.

    Pictures count, though not all encoders see them: or all that are edited by one text would go to one replica.
    """
    return hashlib.sha256(
        repr((request.kind, request.prompt, request.adapters, _samples(pictures))).encode()
    ).hexdigest()


def _samples(pictures: InputPictures | None) -> list[tuple[int, bytes]]:
    if pictures is None:
        return []
    files = (*pictures.images, pictures.mask, pictures.control, pictures.video)
    return [(len(data), data[-_SAMPLE:]) for data in files if data is not None]
