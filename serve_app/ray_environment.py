"""Environment variables that Ray needs for this project, wherever `relay` starts it.

Whoever starts Ray otherwise (`ray start`, the files in cluster/launch) sets them there.
"""

RAY_ENVIRONMENT = {
    # Ray starts its workers at nice 15 unless told otherwise: any other process on the host would starve them.
    "RAY_worker_niceness": "0",
    # A proxy that died is missed at the third check: with Ray's 10 s the door is shut for half a minute.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "0.25",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve_app.proxy_middleware:build_middlewares",
}
"""By name; what the shell says already wins."""
