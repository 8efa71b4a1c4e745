"""Test of `relay bench keys`; runs only with --thorough."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.relay_server import ENV, RELAY, free_port


@pytest.mark.slow
@pytest.mark.thorough
def test_both_keys_are_served_and_compared(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    options = ["--quick", "--steps", "4", "--port", str(free_port()), "--json", str(file)]
    done = subprocess.run([RELAY, "bench", "keys", *options], env=ENV, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = {row["client"]: row for row in json.loads(file.read_text())["rows"]}
    assert rows["alone"]["requests"] == rows["beside"]["requests"] == 8
    assert rows["alone"]["over_alone"] == 1
    assert rows["beside"]["over_alone"] == rows["beside"]["p95_s"] / rows["alone"]["p95_s"]
