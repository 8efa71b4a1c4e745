"""A target file is written whole or not at all, in its final place."""

from pathlib import Path

import pytest

from deployments.media.target_file import write_file


def test_a_file_is_whole_and_alone(tmp_path: Path) -> None:
    for data in (b"first", b"second, in its place"):
        assert write_file(f"file://{tmp_path}/video.mp4", data)
        assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("video.mp4", data)]


def test_a_folder_that_is_not_here_is_not_made(tmp_path: Path) -> None:
    assert not write_file(f"file://{tmp_path}/elsewhere/video.mp4", b"data")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_whole_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="bytes-like"):
        write_file(f"file://{tmp_path}/video.mp4", "no bytes")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_an_object_store_needs_no_folder() -> None:
    assert write_file("memory://new/folder/video.mp4", b"data")
