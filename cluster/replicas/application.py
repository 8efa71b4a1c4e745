"""The Serve application that a replica belongs to."""

from ray import serve


def application_name() -> str:
    """Returns the name of this replica's application, which is known from the replica's constructor on."""
    name: str = serve.get_replica_context().app_name
    return name
