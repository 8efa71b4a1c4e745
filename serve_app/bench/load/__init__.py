"""The load generator of `relay bench serve`, for relay or any other server with OpenAI's API.

workload (what is requested, and when) -> loads (the runs that the options describe) -> endpoint (one request over
HTTP) -> loop (many requests, from separate processes that report each outcome) -> figures (statistics of the
outcomes) -> curves (a chart of them). Nothing here imports torch or Ray, so that a client starts at once.
"""
