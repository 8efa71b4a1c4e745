"""How a request passes through the stages: streams, events, retries, isolation, the journal and the deadline."""
