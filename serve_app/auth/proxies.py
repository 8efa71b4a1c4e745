"""Checks where Serve's proxies listen by asking Serve, because not every way to start it uses `relay serve`."""

import ray
from ray.serve.config import ProxyLocation
from ray.serve.context import _get_global_client

from serve_app.auth.config import Access
from serve_app.auth.listening import find_listening_fault


def check_listening(access: Access) -> None:
    """Checks the proxies if Serve is already running. Raises ValueError."""
    client = _get_global_client(raise_if_no_controller_running=False) if ray.is_initialized() else None
    if client is None:
        return
    http = client.http_config
    fault = find_listening_fault(None if http.location == ProxyLocation.Disabled else http.host, [access])
    if fault is not None:
        raise ValueError(fault)
