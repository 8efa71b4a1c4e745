"""A PostgreSQL server for tests, on loopback, run as a user other than root."""

import os
import pwd
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.relay_server import free_port

PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
"""Folders of PostgreSQL's programs, where Debian's package installs them; the newest version last."""


@contextmanager
def postgresql(folder: Path) -> Iterator[str]:
    """Yields the URL of a running server.

    folder: is created, for everything that the server writes.
    """
    programs, port = PROGRAMS[-1], free_port()
    folder.mkdir()
    as_user = {}
    if os.getuid() == 0:  # PostgreSQL refuses to run as root
        user = pwd.getpwnam("nobody")
        shutil.chown(folder, user.pw_uid, user.pw_gid)
        as_user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    data, log = folder / "data", folder / "log"

    def run(*command: str) -> None:
        subprocess.run(
            [programs / command[0], *command[1:]], check=True, cwd=folder, stdout=subprocess.DEVNULL, **as_user
        )

    run("initdb", "-D", str(data), "-U", "relay", "-A", "trust", "--no-sync", "-E", "UTF8", "--locale", "C")
    options = f"-h 127.0.0.1 -p {port} -k {folder} -c fsync=off"
    run("pg_ctl", "-D", str(data), "-l", str(log), "-w", "-o", options, "start")
    try:
        yield f"postgresql://relay@127.0.0.1:{port}/postgres"
    finally:
        run("pg_ctl", "-D", str(data), "-m", "immediate", "-w", "stop")
