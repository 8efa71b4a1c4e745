"""The pages at `/` and `/docs`: one file each, no build step, nothing loaded from anywhere else."""

from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse

PAGES = {"/": "page.html", "/docs": "docs.html"}
POLICY = {
    "default-src": "'none'",
    "script-src": "'unsafe-inline'",
    "style-src": "'unsafe-inline'",
    "img-src": "blob: data:",
    "media-src": "blob:",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'self'",
}
"""Only what is written in the file itself may run, and it may talk to this server alone."""
HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "; ".join(f"{what} {where}" for what, where in POLICY.items()),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def add_pages(api: FastAPI) -> None:
    """Answers `GET` with them."""
    for path, name in PAGES.items():
        file = Path(__file__).with_name(name)

        async def page(_: Request, file: Path = file) -> FileResponse:
            return FileResponse(file, media_type="text/html", headers=HEADERS)

        api.add_route(path, page, include_in_schema=False)
