"""Serves the pages. Nothing is built, and nothing is loaded from anywhere else."""

from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.staticfiles import StaticFiles

PAGES = {"/": "index.html", "/docs": "docs.html"}
FILES = "/page"
"""Under which their scripts and styles lie."""
POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "blob: data:",
    "media-src": "blob:",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'self'",
    "require-trusted-types-for": "'script'",
}
"""Only this server's own files may run, they may talk to this server alone, and no text becomes markup."""
HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "; ".join(f"{what} {where}" for what, where in POLICY.items()),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class PageFiles(StaticFiles):
    """Asked again each time, and answered 304 where nothing is new."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(HEADERS)
        return response


def add_pages(api: FastAPI) -> None:
    """Answers `GET` with them."""
    files = PageFiles(directory=Path(__file__).with_name("files"), follow_symlink=True)  # installers may link
    for path, name in PAGES.items():

        async def page(request: Request, name: str = name) -> Response:
            return await files.get_response(name, request.scope)

        api.add_route(path, page, include_in_schema=False)
    api.mount(FILES, files)
