"""Sends requests, and compares the answers with the plain pipeline's images."""

import base64
import io
import logging
from collections.abc import Sequence
from typing import Any

import httpx
import numpy as np
from PIL import Image

from serve_app.bench.report import Row
from serve_app.bench.whole import PlainPipeline

log = logging.getLogger(__name__)

Body = dict[str, Any]
TIMEOUT_S = 300.0


def open_client(url: str) -> httpx.AsyncClient:
    """Returns a client with a long timeout, since the server may retry a request internally."""
    return httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S)


async def post(client: httpx.AsyncClient, body: Body) -> bytes:
    """Requests one image. Raises httpx.HTTPStatusError."""
    answer = await client.post("/v1/images/generations", json=body)
    answer.raise_for_status()
    return base64.b64decode(answer.json()["data"][0]["b64_json"])


def is_rejection(answer: bytes | BaseException) -> bool:
    """Whether the answer is an HTTP error whose body has relay's error format."""
    if not isinstance(answer, httpx.HTTPStatusError):
        return False
    try:
        return bool(answer.response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return False


class Judge:
    """Compares images with those of the plain pipeline, each of which it generates once."""

    def __init__(self, plain: PlainPipeline) -> None:
        self._plain = plain
        self._pictures: dict[str, bytes] = {}

    def judge(self, bodies: Sequence[Body], answers: Sequence[bytes | BaseException]) -> Row:
        """Returns `requests`, `answered`, and `grey_levels`, the largest difference of a pixel. Logs errors."""
        for answer in answers:
            if isinstance(answer, BaseException):
                log.error("not answered: %r", answer)
        answered = [pair for pair in zip(bodies, answers, strict=True) if isinstance(pair[1], bytes)]
        return {
            "requests": len(bodies),
            "answered": len(answered),
            "grey_levels": max((self._grey_levels(body, answer) for body, answer in answered), default=0),
        }

    def _grey_levels(self, body: Body, picture: Any) -> int:
        key = str(sorted(body.items()))
        if key not in self._pictures:
            self._pictures[key] = self._plain.draw(**body)
        one, other = (
            np.asarray(Image.open(io.BytesIO(data))).astype(int) for data in (picture, self._pictures[key])
        )
        return int(np.abs(one - other).max())
