"""Test of `relay bench ready`, on Rays of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.thorough
def test_the_stages_import_once_and_are_told_beside_the_whole_pipeline(tmp_path: Path) -> None:
    """The benchmark starts three apps on two Rays."""
    file = tmp_path / "rows.json"
    command = [str(Path(sys.executable).with_name("relay")), "bench", "ready", "--quick", "--json", str(file)]
    run = subprocess.run(
        command, env=os.environ | {"RAY_worker_niceness": "0"}, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-4000:]
    rows = {(row["design"], row["process"]): row for row in json.loads(file.read_text())["rows"]}
    whole = rows["whole pipeline", "all"]
    assert whole["ratio"] == 1.0
    assert rows["three stages", "all"]["ratio"] * whole["ready_s"] == rows["three stages", "all"]["ready_s"]
    imports_s = rows["three stages", "fork server"]["cpu_s"]
    for stage in ("encoder", "transformer", "VAE"):
        assert 0 < rows["three stages", stage]["cpu_s"] < imports_s
    assert rows["three stages, again", "all"]["ready_s"] < rows["three stages", "all"]["ready_s"]
