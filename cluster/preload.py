"""`preload`, a field of Ray's `runtime_env`: workers that need not import what others like them have imported.

A stage's imports take longer than all else of its start, and a node's stages import nearly the same. So a fork
server (fork_server.py) imports it once, and each worker is forked of it (forked_worker.py). Ray's agent, on every
node, loads this plugin where RAY_RUNTIME_ENV_PLUGINS names it; where it does not, Ray ignores the field, and
workers import for themselves.
"""

import asyncio
import hashlib
import json
import logging
import os
import socket
from typing import Any

from ray._private.runtime_env.context import RuntimeEnvContext
from ray._private.runtime_env.plugin import RuntimeEnvPlugin

from cluster.forked_worker import FORK_SERVER, PRELOAD, connect
from cluster.serve_options import PRELOAD_FIELD

PATIENCE_S = 300.0
"""With what is imported, from a slow disk; half of what Ray has with a runtime environment."""


class PreloadPlugin(RuntimeEnvPlugin):  # type: ignore[misc]
    name = PRELOAD_FIELD
    priority = 90  # after those that choose which Python, from which folder, with which variables

    async def create(
        self, uri: str | None, runtime_env: Any, context: RuntimeEnvContext, logger: logging.Logger
    ) -> int:
        """Waits for the server: workers that wait keep others from starting, for Ray starts few at a time."""
        command = " ".join([*context.command_prefix, "exec", context.py_executable])
        environment = os.environ | context.env_vars | _variables(runtime_env, context)
        try:
            with await asyncio.to_thread(connect, command, environment, PATIENCE_S) as server:
                server.shutdown(socket.SHUT_WR)
                await asyncio.to_thread(server.recv, 1)  # it hears none before it has imported
        except OSError as error:
            logger.warning("workers will import for themselves: %r", error)
        return 0

    def modify_context(
        self, uris: list[str], runtime_env: Any, context: RuntimeEnvContext, logger: logging.Logger
    ) -> None:
        context.env_vars |= _variables(runtime_env, context)
        context.py_executable += " -P -m cluster.forked_worker"


def _variables(runtime_env: Any, context: RuntimeEnvContext) -> dict[str, str]:
    """Workers whose whole environment is the same have one server, for what is imported reads it."""
    preload = json.dumps(runtime_env[PRELOAD_FIELD])
    same = [context.py_executable, context.command_prefix, sorted(context.env_vars.items()), preload]
    name = hashlib.sha256(json.dumps(same).encode()).hexdigest()[:16]
    return {FORK_SERVER: name, PRELOAD: preload}
