"""`preload`, a field of Ray's `runtime_env`: workers that need not import what others like them have imported.

A stage's imports take longer than all else of its start, and a node's stages import nearly the same. So they are
imported once, in a fork server (fork_server.py), and each worker is forked of it (forked_worker.py). Ray's agent on every node
loads the plugin here, where RAY_RUNTIME_ENV_PLUGINS names it; where it does not, Ray ignores the field, and workers
import for themselves.
"""

import hashlib
import json
import logging
from typing import Any

from ray._private.runtime_env.context import RuntimeEnvContext
from ray._private.runtime_env.plugin import RuntimeEnvPlugin

from cluster.forked_worker import FORK_SERVER, PRELOAD

FIELD = "preload"
"""[a function, as "module:name", its arguments]"""


class PreloadPlugin(RuntimeEnvPlugin):  # type: ignore[misc]
    name = FIELD
    priority = 90  # after those that choose which Python, from which folder, and its variables

    def modify_context(
        self, uris: list[str], runtime_env: Any, context: RuntimeEnvContext, logger: logging.Logger
    ) -> None:
        """Workers whose whole environment is the same have one fork server: imports read that environment."""
        preload = json.dumps(runtime_env[FIELD])
        same = [context.py_executable, context.command_prefix, sorted(context.env_vars.items()), preload]
        context.env_vars[FORK_SERVER] = hashlib.sha256(json.dumps(same).encode()).hexdigest()[:16]
        context.env_vars[PRELOAD] = preload
        context.py_executable += " -P -m cluster.forked_worker"
