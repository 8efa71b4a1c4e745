"""How much work there is, how long it takes, and whether another request is admitted."""
