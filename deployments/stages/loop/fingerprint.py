"""Fingerprints, by which a journal is matched to a request and to the weights, config and code that serve it."""

import hashlib
import importlib.metadata
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from deployments.request import GenerationRequest, InputPictures

_NUM_SAMPLES, _SAMPLE_BYTES = 16, 4096
"""Number and size of a file's samples that are hashed; samples suffice, as other weights differ everywhere."""


class Fingerprint:
    """The fingerprint of one checkpoint as it is served here; the same on every node that has the same files."""

    def __init__(self, folder: Path, components: Collection[str], *settings: Any) -> None:
        """settings: settings that change the results of forwards."""
        versions = [importlib.metadata.version(name) for name in ("latent-relay", "diffusers")]
        self._digest = hashlib.sha256(repr((versions, settings)).encode())
        for name in sorted(components):
            for file in sorted(_files(folder / name)):
                self._digest.update(f"{file.relative_to(folder)} {file.stat().st_size}".encode())
                self._digest.update(_samples(file))

    def of(self, request: GenerationRequest, pictures: InputPictures | None) -> str:
        digest = self._digest.copy()
        digest.update(repr((request, pictures)).encode())
        return digest.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    """Yields all files in a folder, following links."""
    for parent, _, names in os.walk(folder, followlinks=True):
        yield from (Path(parent) / name for name in names)


def _samples(file: Path) -> bytes:
    step = max(_SAMPLE_BYTES, file.stat().st_size // _NUM_SAMPLES)
    samples = bytearray()
    with file.open("rb") as opened:
        for i in range(_NUM_SAMPLES):
            opened.seek(i * step)
            samples += opened.read(_SAMPLE_BYTES)
    return bytes(samples)
