"""Which files are videos, by their first bytes."""

MP4, WEBM = "mp4", "matroska"
"""Libavformat's names of what reads them; it reads QuickTime and Matroska, too."""


def find_format(data: bytes) -> str | None:
    """One of the two; None: it is no video that is taken. HEIC and AVIF pictures begin as MP4 does."""
    if data[4:8] == b"ftyp" and data[8:11] not in (b"hei", b"mif", b"avi"):
        return MP4
    return WEBM if data.startswith(b"\x1aE\xdf\xa3") else None
