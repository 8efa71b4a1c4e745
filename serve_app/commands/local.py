"""Gives a command a Serve app: the running one, or a private one that ends with the command."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from serve_app.app import compose_app
from serve_app.config.app import AppConfig
from serve_app.config.serve_file import APP_NAME


@contextmanager
def app_handle(config: AppConfig | None) -> Iterator[DeploymentHandle]:
    """Yields a handle of the app named "relay".

    With a config, a private Ray and Serve are started on this machine and shut down afterwards; without one,
    the app must be running. Raises ConnectionError or RayServeException if it is not.
    """
    if config is not None:
        with private_serve():
            yield serve.run(compose_app(config), name=APP_NAME, route_prefix=None)
        return
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
    try:
        yield serve.get_app_handle(APP_NAME)
    finally:
        ray.shutdown()


@contextmanager
def private_serve(http_port: int | None = None) -> Iterator[None]:
    """Runs a private Ray and Serve while the context lasts, for apps called by their handles or over HTTP."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        if http_port is None:
            serve.start(proxy_location="Disabled")
        else:
            serve.start(http_options={"host": "127.0.0.1", "port": http_port})
        yield
    finally:
        serve.shutdown()
        ray.shutdown()


def is_running() -> bool:
    """Whether a Ray cluster that serves the app can be reached from here."""
    try:
        ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
    except ConnectionError:
        return False
    try:
        return APP_NAME in serve.status().applications
    finally:
        ray.shutdown()
