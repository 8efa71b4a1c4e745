"""`relay bench ready`, on a Ray of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.thorough
def test_idle_processes_are_ready_before_those_that_serve(tmp_path: Path) -> None:
    """Starts six apps."""
    file = tmp_path / "rows.json"
    command = [str(Path(sys.executable).with_name("relay")), "bench", "ready", "--quick", "--json", str(file)]
    run = subprocess.run(
        command, env=os.environ | {"RAY_worker_niceness": "0"}, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-4000:]
    rows = json.loads(file.read_text())["rows"]
    assert [row["design"] for row in rows] == ["three stages", "whole pipeline"]
    for row in rows:
        assert 0 < row["process_s"] < row["ready_s"]
