"""Environment variables that Ray needs for this project, wherever `relay` starts it.

Whoever starts Ray otherwise (`ray start`, the files in cluster/launch) sets them there.
"""

RAY_ENVIRONMENT = {
    # Ray starts its workers at nice 15 unless told otherwise: any other process on the host would starve them.
    "RAY_worker_niceness": "0",
}
"""By name; what the shell says already wins."""
