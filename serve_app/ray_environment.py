"""Variables that Ray must be started with; its own processes read them."""

RAY_ENVIRONMENT: dict[str, str] = {
    # Ray starts its workers at nice 15, to be starved by any other process.
    "RAY_worker_niceness": "0",
    # A proxy that died is missed at the third check: with Ray's 10 s the door is shut for half a minute.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "0.25",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve_app.proxy_exit:middlewares",
}
