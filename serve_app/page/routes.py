"""Serves the pages. There is no build step, and nothing is loaded from other hosts."""

from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.staticfiles import StaticFiles

PAGES = {"/": "index.html", "/docs": "docs.html"}
FILES = "/page"
"""Path of their scripts and styles."""
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
"""Only this server's own files may run, they may connect only to this server, and no text becomes markup."""
HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "; ".join(f"{what} {where}" for what, where in POLICY.items()),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class PageFiles(StaticFiles):
    """Files that browsers revalidate each time, with a 304 if nothing has changed."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(HEADERS)
        return response


def add_pages(api: FastAPI) -> None:
    """Adds routes that answer `GET` with the pages."""
    files = PageFiles(directory=Path(__file__).with_name("files"), follow_symlink=True)  # installers may link
    for path, name in PAGES.items():

        async def page(request: Request, name: str = name) -> Response:
            return await files.get_response(name, request.scope)

        api.add_route(path, page, include_in_schema=False)
    api.mount(FILES, files)
