"""Tests that the replicas of a served app are forked from one process."""

import psutil

from tests.app import App


def fork_servers(app: App, deployment: str) -> list[int]:
    """Returns the pid of the replica's parent, in a list; the list is empty if the parent is not a fork server."""
    pid = app.deployment(deployment).stats.remote().result()
    pid = getattr(pid, "pid", None) or pid.ranks[0].pid
    parent = psutil.Process(pid).parent()
    assert parent is not None
    return [parent.pid] if "cluster.fork_server" in parent.cmdline() else []


def test_all_stages_of_an_app_are_forked_of_one_server(flux_app: App) -> None:
    found = [fork_servers(flux_app, name) for name in ("Encoder", "Transformer", "Vae")]
    assert found[0]
    assert found == found[:1] * 3
