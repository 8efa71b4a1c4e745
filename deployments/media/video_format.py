"""Recognises videos by their first bytes."""

MP4, WEBM = "mp4", "matroska"
"""libavformat's names of the demuxers, which read QuickTime and Matroska, too."""


def find_format(data: bytes) -> str | None:
    """Returns MP4 or WEBM; None if the file is no accepted video. HEIC and AVIF images begin like an MP4."""
    if data[4:8] == b"ftyp" and data[8:11] not in (b"hei", b"mif", b"avi"):
        return MP4
    return WEBM if data.startswith(b"\x1aE\xdf\xa3") else None
