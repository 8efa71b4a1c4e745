"""Where an image and its journal are written."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """Where the stages write an image, and its journal while it is denoised; None: the ingress keeps it."""

    url: str | None
    journal_url: str | None


IN_MEMORY = Target(None, None)
