"""`relay serve`: everything that can be known is checked, then Ray and Serve are started, and ended with it."""

import difflib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from cluster.config import describe_errors, without_unknown_keys
from serve_app.auth.listening import find_listening_fault
from serve_app.config import (
    IMPORT_PATH,
    AppConfig,
    ConfigError,
    find_our_applications,
    parse_app_config,
    read_serve_file,
)
from serve_app.config_check import check_requests
from serve_app.files import check_files, resolve_family
from serve_app.port import find_port_fault
from serve_app.tls import find_tls_fault

SERVER = "serve_app.server"
SERVE_SCHEMA = "ray.serve.schema"
SERVE_CHECKS = "ray.serve._private.utils"
"""They import Ray, so they are looked up only once the config is read."""
LOCAL = "local"


def serve_command(
    config: Annotated[Path, typer.Argument(help="Serve YAML, such as configs/quickstart.yaml")],
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="instead of http_options.port")] = None,
    host: Annotated[str | None, typer.Option(help="instead of http_options.host; 0.0.0.0: all addresses")] = None,
    is_open: Annotated[
        bool, typer.Option("--open", help="let everybody in who reaches it, where no key is asked for")
    ] = False,
    grace: Annotated[
        float, typer.Option(min=0, help="seconds that running requests get when it is told to end")
    ] = 5.0,
    address: Annotated[
        str, typer.Option(envvar="RAY_ADDRESS", help="of a running Ray cluster to serve on; local: start one")
    ] = LOCAL,
) -> None:
    """Serve a config on this machine until Ctrl-C: mistakes are told before anything starts."""
    sys.path.insert(0, "")  # other applications' import paths are looked up from here, as by `serve run`
    is_local = address == LOCAL
    raw = read_serve_file(config)
    if is_open:
        open_applications(config, raw)
    apps, mistakes = check_applications(config, raw, is_local=is_local)
    given = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
    deployment, more = check_schema(config, raw, given)
    mistakes += more
    if deployment is not None and not more:
        host = None if deployment.proxy_location == "Disabled" else deployment.http_options.host
        fault = find_listening_fault(host, [app.access for app in apps.values()])
        mistakes += [] if fault is None else [fault]
    if is_local and deployment is not None:
        http = deployment.http_options
        faults = (find_port_fault(http.host, http.port), find_tls_fault(http))
        mistakes += [fault for fault in faults if fault is not None]
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    names = {name: _who(app) for name, app in apps.items()}
    raise typer.Exit(importlib.import_module(SERVER).run_server(deployment, names, address=address, grace_s=grace))


def open_applications(path: Path, raw: dict[str, Any]) -> None:
    """Has each that serves a checkpoint say so."""
    for application in find_our_applications(path, raw):
        args = application.get("args") or {}
        if isinstance(args, dict):
            application["args"] = args | {"open": True}


def _who(app: AppConfig) -> str:
    """With its verb."""
    return " and ".join(served.name for served in app.served) + (" is" if app.is_one else " are")


def check_applications(
    path: Path, raw: dict[str, Any], *, is_local: bool
) -> tuple[dict[str, AppConfig], list[str]]:
    """The configs of those that serve a checkpoint, by name, and a line for every mistake.

    is_local: this machine will serve, so files must be here.
    """
    ours = find_our_applications(path, raw)
    apps, mistakes = {}, []
    for application in ours:
        name = str(application.get("name", "default"))
        source = str(path) if len(ours) == 1 else f"{path}, application {name}"
        try:
            apps[name] = _check_app(application.get("args") or {}, source, is_local=is_local)
        except ConfigError as error:
            mistakes += str(error).splitlines()
    for application in raw["applications"]:
        given = str(application.get("import_path"))
        if given != IMPORT_PATH and difflib.get_close_matches(given, [IMPORT_PATH], cutoff=0.75):
            mistakes.append(f"{path}: import_path {given!r} does not exist (did you mean {IMPORT_PATH!r}?)")
    return apps, mistakes


def _check_app(args: Any, source: str, *, is_local: bool) -> AppConfig:
    app = parse_app_config(args, source=source)
    try:
        app = resolve_family(app)
        check_requests(app)
        if is_local:
            check_files(app)
    except ConfigError as error:
        raise ConfigError("\n".join(f"{source}: {line}" for line in str(error).splitlines())) from error
    return app


def check_schema(path: Path, raw: dict[str, Any], http_options: dict[str, Any]) -> tuple[Any, list[str]]:
    """Ray's own `ServeDeploySchema` of the YAML, None if it has mistakes, and a line for each.

    Ray takes unknown keys for those of a newer Ray, and we do not.

    Args:
        http_options: instead of what the YAML says.
    """
    schema = importlib.import_module(SERVE_SCHEMA).ServeDeploySchema
    known, lines = without_unknown_keys(schema, raw)
    options = known.get("http_options") or {}
    if isinstance(options, dict):
        known["http_options"] = options | http_options
    deployment = None
    try:
        deployment = schema.model_validate(known)
        lines += _find_route_faults(deployment)
    except ValidationError as error:
        lines += describe_errors(error).splitlines()
    return deployment, [f"{path}: {line}" for line in lines]


def _find_route_faults(deployment: Any) -> Iterator[str]:
    """What Serve would say once an application is built."""
    check = importlib.import_module(SERVE_CHECKS).validate_route_prefix
    for i, application in enumerate(deployment.applications):
        try:
            check(application.route_prefix)
        except ValueError as error:
            yield f"applications.{i}: {error}"
