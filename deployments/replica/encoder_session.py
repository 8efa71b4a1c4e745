"""Session ids that route equal prompts to one encoder replica. Imports no torch."""

import hashlib

from deployments.request import GenerationRequest, InputPictures

_SAMPLE = 1024
"""Number of bytes at the end of each file that are hashed: in compressed files they depend on all of the image."""


def encoder_session(request: GenerationRequest, pictures: InputPictures | None = None) -> str:
    """Returns the session id of a request, the same in every process for requests that share cached encodings.

    Other requests may get it by chance. Images are included although not all encoders see them, because otherwise
    all edits with one text would go to one replica.
    """
    return hashlib.sha256(
        repr((request.kind, request.prompt, request.adapters, _samples(pictures))).encode()
    ).hexdigest()


def _samples(pictures: InputPictures | None) -> list[tuple[int, bytes]]:
    if pictures is None:
        return []
    files = (*pictures.images, pictures.mask, pictures.control, pictures.video)
    return [(len(data), data[-_SAMPLE:]) for data in files if data is not None]
