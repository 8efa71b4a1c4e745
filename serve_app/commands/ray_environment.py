"""Environment variables that this project needs Ray to have. `relay` sets them whenever it starts Ray.

If Ray is started in another way (`ray start`, the files in cluster/launch), they must be set there.
"""

RAY_ENVIRONMENT = {
    # By default, Ray starts its workers at nice 15, and any other process on the host would starve them.
    "RAY_worker_niceness": "0",
    # Limits each log file of each process. With Ray's default of 512 MiB, the logs fill a disk.
    "RAY_ROTATION_MAX_BYTES": str(32 * 2**20),
    "RAY_ROTATION_BACKUP_COUNT": "2",
    # The name misleads: on any system, 0 restricts a newly started Ray to this machine, with all its ports on the
    # loopback interface. It has no effect on a process that connects to a cluster of several machines.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # A dead proxy is replaced after the third failed check: with Ray's default of 10 s, HTTP is down for half a
    # minute.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "0.25",
    "RAY_SERVE_CONTROLLER_CALLBACK_IMPORT_PATH": "cluster.termination:exit_on_sigterm",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve_app.proxy_middleware:build_middlewares",
    # Without this plugin, every replica imports torch, diffusers and transformers itself.
    "RAY_RUNTIME_ENV_PLUGINS": '[{"class":"cluster.preload.PreloadPlugin"}]',
}
"""Values by name; a variable that is already set wins. Set them before importing Ray, which reads some at once."""
