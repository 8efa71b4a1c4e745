"""Tests of finding and killing a process's descendants."""

import subprocess
import sys

from cluster.processes import find_descendants, kill_all


def test_children_of_children_are_found_and_killed() -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(1, flush=True); input()'])"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "1\n"
        assert child.pid in find_descendants()
        found = {child.pid} | find_descendants(child.pid)  # other tests may have started other children
        assert len(found) == 2
        kill_all(found)
        assert child.wait(timeout=30) == -9
        assert child.stdout.read() == ""  # the grandchild held it open
    assert not found & find_descendants()
    kill_all(found)  # all of them are gone already
