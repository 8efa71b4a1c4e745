"""A Ray and a Serve of a benchmark's own, for apps that are called by their handles."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray import serve


@contextmanager
def private_serve() -> Iterator[None]:
    """Ends both. Without HTTP, and without Serve's word on every application."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        serve.start(proxy_location="Disabled")
        yield
    finally:
        serve.shutdown()
        ray.shutdown()
