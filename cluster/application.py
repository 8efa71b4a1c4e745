"""The Serve application that a replica belongs to."""

from ray import serve


def application_name() -> str:
    """For a replica's constructor, or later."""
    name: str = serve.get_replica_context().app_name
    return name
