"""Tests of the files of jobs, on disk and in an object store."""

from pathlib import Path

import pytest

from serve_app.jobs import files as files_module
from serve_app.jobs.files import JobFiles

DATA = bytes(range(256)) * 10


@pytest.fixture(params=["folder", "object store"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> JobFiles:
    files = JobFiles(str(tmp_path) if request.param == "folder" else f"memory:/{tmp_path}")
    files.make_folder("a")
    return files


def test_what_is_written_is_read(files: JobFiles) -> None:
    files.write("a", "in-0", DATA)
    assert files.size("a", "in-0") == len(DATA)
    assert files.read("a", "in-0") == DATA


@pytest.mark.parametrize(("start", "end"), [(0, 2560), (0, 1), (2559, 2560), (99, 1001), (500, 500)])
def test_a_part_is_read_in_pieces(files: JobFiles, start: int, end: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "PIECE_BYTES", 100)
    files.write("a", "video.mp4", DATA)
    pieces = list(files.pieces("a", "video.mp4", start, end))
    assert b"".join(pieces) == DATA[start:end]
    assert all(len(piece) <= 100 for piece in pieces)


def test_a_file_is_removed_or_all_of_a_job(files: JobFiles) -> None:
    for name in ("one", "two", "three"):
        files.write("a", name, DATA)
    files.remove("a", "one")
    with pytest.raises(FileNotFoundError):
        files.size("a", "one")
    files.size("a", "two")
    files.remove("a")
    for name in ("two", "three"):
        with pytest.raises(FileNotFoundError):
            files.read("a", name)


def test_what_is_not_there_is_removed_already(files: JobFiles) -> None:
    files.remove("a", "nothing")
    files.remove("b")


def test_what_another_process_wrote_is_removed_too(files: JobFiles) -> None:
    other = JobFiles(files.url("", "").rstrip("/"))
    files.write("a", "one", DATA)
    other.write("a", "two", DATA)
    files.remove("a")
    for name in ("one", "two"):
        with pytest.raises(FileNotFoundError):
            other.size("a", name)


def test_a_folder_that_is_gone_is_not_made_anew(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="folder does not exist"):
        JobFiles(str(tmp_path)).write("a", "one", DATA)
