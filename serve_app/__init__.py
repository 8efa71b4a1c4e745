"""The application: config in, HTTP and Python handles out. The only package that knows HTTP.

Read in this order: config (what a YAML may say), app (config to Serve application), ingress (the deployment
that clients meet), relay (what it does), routes (HTTP), body_limit, openai_api (bodies of requests and answers),
validation (bodies to requests, bad input refused), generation (one request's way through the three stages),
losses (what is repeated), suspects (and who alone), partials (pictures that still form), sse (events over HTTP),
errors, replicas, last_seen and status (how it goes), trace_ids and tracing (who asked), ray_environment,
proxy_middleware, http_connection and proxy_exit (what Ray's own processes are told, and Serve's proxies do), files
and room (what is checked before a start), local and cli (the shell), serve_cli, port, server and start_progress
(`relay serve`), bench (measurements).
"""
