"""Environment variables that Ray needs for this project, wherever `relay` starts it.

Whoever starts Ray otherwise (`ray start`, the files in cluster/launch) sets them there.
"""

RAY_ENVIRONMENT = {
    # Ray starts its workers at nice 15 unless told otherwise: any other process on the host would starve them.
    "RAY_worker_niceness": "0",
    # Of each log of each process; with Ray's own 512 MiB they fill a disk.
    "RAY_ROTATION_MAX_BYTES": str(32 * 2**20),
    "RAY_ROTATION_BACKUP_COUNT": "2",
    # The name misleads: on any system it makes a Ray that is started one of this machine alone, with all its ports
    # on the loopback interface. A process that connects to a cluster of several machines is none the worse.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # A proxy that died is missed at the third check: with Ray's 10 s the door is shut for half a minute.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "0.25",
    "RAY_SERVE_CONTROLLER_CALLBACK_IMPORT_PATH": "cluster.termination:exit_on_sigterm",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve_app.proxy_middleware:build_middlewares",
    # Without it every replica imports torch, diffusers and transformers for itself.
    "RAY_RUNTIME_ENV_PLUGINS": '[{"class":"cluster.preload.PreloadPlugin"}]',
}
"""By name; what the shell says already wins. To be set before Ray is imported, which reads some at once."""
