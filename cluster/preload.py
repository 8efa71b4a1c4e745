"""`preload`, a field of Ray's `runtime_env`: workers that need not import what others like them have imported.

A stage's imports take longer than all else of its start, and a node's stages import nearly the same. So a fork
server (fork_server.py) imports it once, and each worker is forked of it (forked_worker.py). Ray's agent, on every
node, loads this plugin where RAY_RUNTIME_ENV_PLUGINS names it; where it does not, Ray ignores the field, and
workers import for themselves.
"""

import hashlib
import json
import logging
import sys
from typing import Any

from ray._private.runtime_env.context import RuntimeEnvContext
from ray._private.runtime_env.plugin import RuntimeEnvPlugin

from cluster.forked_worker import FORK_SERVER, PRELOAD
from cluster.serve_options import PRELOAD_FIELD


class PreloadPlugin(RuntimeEnvPlugin):  # type: ignore[misc]
    name = PRELOAD_FIELD
    priority = 90  # after those that choose which Python, from which folder, with which variables

    def modify_context(
        self, uris: list[str], runtime_env: Any, context: RuntimeEnvContext, logger: logging.Logger
    ) -> None:
        """Workers whose whole environment is the same have one server, for what is imported reads it."""
        if sys.platform != "linux":  # forked_worker.py asks for what other systems lack
            return
        preload = json.dumps(runtime_env[PRELOAD_FIELD])
        same = [context.py_executable, context.command_prefix, sorted(context.env_vars.items()), preload]
        name = hashlib.sha256(json.dumps(same).encode()).hexdigest()[:16]
        context.env_vars |= {FORK_SERVER: name, PRELOAD: preload}
        context.py_executable += " -P -m cluster.forked_worker"
