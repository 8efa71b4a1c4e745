"""The application: turns a config into HTTP and Python interfaces. The only package that knows HTTP.

A request passes these modules, in this order: app (config to Serve application), ingress (the deployment that
clients call), routes (HTTP), validation (bodies to requests; refuses bad input), relay (handling of a request for
one model), generation (through the three stages), errors (everything that can go wrong). proxy_middleware runs in
Serve's HTTP proxies before all of these, and tracing configures where spans are sent. These modules use the
folders auth, http, inputs, models, load, flow and config. jobs and page are further interfaces for clients. cli
and commands are the command line, bench measures; nothing else imports these three.
"""
