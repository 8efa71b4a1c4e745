"""What Ray's own processes are told by their environment, which they have from whoever starts Ray."""

RAY_ENVIRONMENT = {
    "RAY_worker_niceness": "0",  # or any other process on the host would starve them
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve_app.proxy_middleware:build_middlewares",
}
