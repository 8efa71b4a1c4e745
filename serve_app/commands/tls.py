"""Checks, before anything starts, that Serve's proxies can serve HTTPS as `http_options` says."""

import ssl
from typing import Any


def find_tls_fault(http_options: Any) -> str | None:
    """Returns the fault as one sentence, or None if certificate and key are valid, or if neither is set (HTTP).

    http_options: Ray's `HTTPOptionsSchema`.
    """
    certificate, key = http_options.ssl_certfile, http_options.ssl_keyfile
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        return "http_options: HTTPS needs both ssl_certfile and ssl_keyfile; leave out both for HTTP"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key, lambda: http_options.ssl_keyfile_password or "")
        if http_options.ssl_ca_certs is not None:
            context.load_verify_locations(http_options.ssl_ca_certs)
    except OSError as error:
        why = error.strerror or error
        return f"http_options: HTTPS cannot be served with {certificate} and {key}: {why}"
    return None
