"""What Ray must find in the environment of the process that starts it. Imports nothing of Ray."""

RAY_ENVIRONMENT: dict[str, str] = {
    "RAY_worker_niceness": "0",  # Ray's workers run at 15 otherwise, to be starved by any other process
    "RAY_ROTATION_MAX_BYTES": str(32 * 2**20),  # of each log of each process; Ray's own 512 MiB fill a disk
    "RAY_ROTATION_BACKUP_COUNT": "2",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}
"""To be set, where they are not set yet, before Ray is imported.

The last has a name that misleads: on any system it makes a Ray that is started one of this machine alone, with all
its ports on the loopback interface. A process that connects to a cluster of several machines is none the worse."""
