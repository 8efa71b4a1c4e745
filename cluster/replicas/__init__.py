"""A stage's replicas as Serve sees them: their resources, the routing of calls, and how other processes reach
them."""
