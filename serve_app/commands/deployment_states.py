"""Reads how Serve's applications start: what each deployment waits for, and why one cannot start."""

import re
from collections.abc import Mapping
from typing import Any

from ray.serve.schema import ApplicationStatus, DeploymentStatus, ReplicaState

from serve_app.commands.start_progress import READY

_CONSTRUCTOR_FAILED = "failed to start with exception"
_UNPLACED = re.compile(r"Resources required for each replica: (\{.*?\}), total resources available: (\{.*?\})\.")
_MODULE = re.compile(r"^(?:\w+\.)+(?=\w+: )")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class StartFailed(Exception):
    """The app cannot start, or the processes that serve it are gone; the message says why."""


def check_failed(applications: Mapping[str, Any]) -> None:
    """Raises StartFailed if a constructor has raised, since it would again. A replica that died is left to Serve,
    which restarts it."""
    for application in applications.values():
        for name, deployment in application.deployments.items():
            if _CONSTRUCTOR_FAILED in deployment.message and "Traceback" in deployment.message:
                raise StartFailed(f"{name.lower()}: {last_line(deployment.message)}")
        if application.status == ApplicationStatus.DEPLOY_FAILED:
            refused = [line for line in application.message.splitlines() if line.startswith("ConfigError: ")]
            said = [line.removeprefix("ConfigError: ") for line in refused]
            raise StartFailed("\n".join(said) or last_line(application.message))


def last_line(message: str) -> str:
    """Returns the last line of a traceback without colours and module names."""
    lines = [line.strip() for line in _COLOURS.sub("", message).splitlines() if line.strip()]
    return _MODULE.sub("", lines[-1]) if lines else "no reason was given"


def deployment_states(applications: Mapping[str, Any]) -> dict[str, str]:
    """Returns the state of every deployment, by a name for display."""
    found = {}
    for app_name, application in applications.items():
        for name, deployment in application.deployments.items():
            label = name.lower() if len(applications) == 1 else f"{app_name} {name.lower()}"
            found[label] = _state(deployment)
    return found or dict.fromkeys(applications, "being built")


def _state(deployment: Any) -> str:
    replicas = deployment.replicas
    if any(replica.state == ReplicaState.RUNNING for replica in replicas):
        return READY
    if any(replica.pid for replica in replicas):
        return "loading"
    if not replicas and deployment.status == DeploymentStatus.HEALTHY:
        return "asleep"
    wants = _UNPLACED.search(deployment.message)
    return f"waits for {wants[1]}; {wants[2]} are free" if wants else "starting"
