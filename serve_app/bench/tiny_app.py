"""A served tiny FLUX with two shards, for benchmarks that inject faults, shortages and load."""

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray import serve

from serve_app.app import build_app
from serve_app.config.app import AppConfig
from serve_app.config.serve_file import APP_NAME, parse_app_config

MANY_STEPS = 20_000
"""Enough steps that a request which is not cancelled outlasts all others."""


def tiny_config() -> AppConfig:
    """Returns the app's config, with one replica of each stage."""
    resources = {"num_cpus": 0.1, "torch_threads": 1}
    return parse_app_config(
        {
            "model": {
                "name": "tiny",
                "checkpoint": "tiny://flux",
                "defaults": {"width": 64, "height": 64},
            },
            "encoder": resources | {"max_sequence_length": 64},
            "transformer": resources | {"shards": 2},
            "vae": resources,
            "limits": {"max_num_inference_steps": MANY_STEPS},
        }
    )


@contextmanager
def serving(config: AppConfig, **options: Any) -> Iterator[tuple[str, float]]:
    """Serves the app on a private Ray and a free port. Yields its URL and the seconds that it took to start.

    options: arguments of `ray.init`.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR", **options)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        began = time.perf_counter()
        serve.run(build_app(config), name=APP_NAME)
        yield f"http://127.0.0.1:{port}", time.perf_counter() - began
    finally:
        serve.shutdown()
        ray.shutdown()
