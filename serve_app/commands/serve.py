"""`relay serve`: checks everything that can be checked, then runs Ray and Serve until the command ends."""

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
from serve_app.commands.port import find_port_fault
from serve_app.commands.tls import find_tls_fault
from serve_app.config import shipped
from serve_app.config.app import AppConfig, ConfigError
from serve_app.config.check import check_requests
from serve_app.config.checkpoint_files import check_files, find_missing, resolve_family
from serve_app.config.serve_file import IMPORT_PATH, find_our_applications, parse_app_config, read_serve_file

SERVER = "serve_app.commands.server"
SERVE_SCHEMA = "ray.serve.schema"
SERVE_CHECKS = "ray.serve._private.utils"
"""Modules that import Ray, so they are imported only once the config is read."""
LOCAL = "local"


def tell_configs(is_asked: bool) -> None:
    """Prints the names, the purposes and the folder of the configs that come with relay, and exits."""
    if not is_asked:
        return
    told = shipped.tell_configs()
    width = max(map(len, told))
    print("\n".join(f"{name:<{width}}  {sentence}" for name, sentence in told.items()))
    print(f"\nThey are in {shipped.FOLDER}: copy one to change it.")
    raise typer.Exit


def serve_command(
    config: Annotated[Path, typer.Argument(help="Serve YAML, or the name of a shipped one, such as quickstart")],
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="instead of http_options.port")] = None,
    host: Annotated[str | None, typer.Option(help="instead of http_options.host; 0.0.0.0: all addresses")] = None,
    is_open: Annotated[
        bool, typer.Option("--open", help="allow requests without a key, also from other machines")
    ] = False,
    grace: Annotated[
        float, typer.Option(min=0, help="seconds that running requests get after SIGTERM or Ctrl-C")
    ] = 5.0,
    address: Annotated[
        str, typer.Option(envvar="RAY_ADDRESS", help="address of a running Ray cluster; local: start one")
    ] = LOCAL,
    is_verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="show the logs of Ray and Serve here too")
    ] = False,
    is_listing: Annotated[
        bool, typer.Option("--list", callback=tell_configs, is_eager=True, help="list the shipped configs")
    ] = False,
) -> None:
    """Serve a config on this machine until Ctrl-C. Mistakes are reported before anything starts."""
    sys.path.insert(0, "")  # resolves other applications' import paths from here, as `serve run` does
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
    server = importlib.import_module(SERVER)
    raise typer.Exit(server.run_server(deployment, names, address=address, grace_s=grace, is_verbose=is_verbose))


def open_applications(path: Path, raw: dict[str, Any]) -> None:
    """Sets `open: true` in every application that serves a checkpoint."""
    for application in find_our_applications(path, raw):
        args = application.get("args") or {}
        if isinstance(args, dict):
            application["args"] = args | {"open": True}


def _who(app: AppConfig) -> str:
    """Returns the names of the app's models, with the verb."""
    return " and ".join(served.name for served in app.served) + (" is" if app.is_one else " are")


def check_applications(
    path: Path, raw: dict[str, Any], *, is_local: bool
) -> tuple[dict[str, AppConfig], list[str]]:
    """Returns the configs of the applications that serve a checkpoint, by name, and one line per mistake.

    is_local: whether this machine will serve, so that the files must be here.
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
    try:
        app = parse_app_config(args, source=source)
    except ConfigError as error:
        raise ConfigError(
            "\n".join([str(error), *(f"{source}: {line}" for line in find_missing(args))])
        ) from error
    try:
        app = resolve_family(app)
        check_requests(app)
        if is_local:
            check_files(app)
    except ConfigError as error:
        raise ConfigError("\n".join(f"{source}: {line}" for line in str(error).splitlines())) from error
    return app


def check_schema(path: Path, raw: dict[str, Any], http_options: dict[str, Any]) -> tuple[Any, list[str]]:
    """Returns Ray's `ServeDeploySchema` of the YAML, None if it is invalid, and one line per mistake.

    Ray ignores unknown keys, which may be those of a newer Ray; here they are mistakes.

    Args:
        http_options: these replace those in the YAML.
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
    """Yields the mistakes in route prefixes that Serve would report only once an application is built."""
    check = importlib.import_module(SERVE_CHECKS).validate_route_prefix
    for i, application in enumerate(deployment.applications):
        try:
            check(application.route_prefix)
        except ValueError as error:
            yield f"applications.{i}: {error}"
