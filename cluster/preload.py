"""`preload`, a field of Ray's `runtime_env`: workers share imports instead of repeating them.

A stage's imports take longer than the rest of its start, and the stages of one node import nearly the same
modules. So a fork server (fork_server.py) imports them once, and each worker is forked from it (forked_worker.py).
Ray's agent on every node loads this plugin if RAY_RUNTIME_ENV_PLUGINS names it; otherwise Ray ignores the field,
and workers do their own imports.
"""

import hashlib
import json
import logging
import sys
from typing import Any

from ray._private.runtime_env.context import RuntimeEnvContext
from ray._private.runtime_env.plugin import RuntimeEnvPlugin

from cluster.forked_worker import FORK_SERVER, PRELOAD
from cluster.replicas.serve_options import PRELOAD_FIELD


class PreloadPlugin(RuntimeEnvPlugin):  # type: ignore[misc]
    name = PRELOAD_FIELD
    priority = 90  # after the plugins that choose the interpreter, the working folder and the variables

    def modify_context(
        self, uris: list[str], runtime_env: Any, context: RuntimeEnvContext, logger: logging.Logger
    ) -> None:
        """Workers share a server only if their whole environment is equal, because imported modules read it."""
        if sys.platform != "linux":  # forked_worker.py needs features of Linux
            return
        preload = json.dumps(runtime_env[PRELOAD_FIELD])
        same = [context.py_executable, context.command_prefix, sorted(context.env_vars.items()), preload]
        name = hashlib.sha256(json.dumps(same).encode()).hexdigest()[:16]
        context.env_vars |= {FORK_SERVER: name, PRELOAD: preload}
        context.py_executable += " -P -m cluster.forked_worker"
