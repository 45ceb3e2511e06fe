"""This module serves the page at ``/``: HTML, styles and scripts that lie beside it, and nothing from elsewhere."""

from __future__ import annotations

import hashlib
from importlib.resources import files

from fastapi import APIRouter, FastAPI, Request, Response
from starlette.exceptions import HTTPException

MEDIA = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
HOME = "index.html"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
"""What a browser may do with the page: its own files and this server, no text of others as script."""


def add_page(app: FastAPI) -> None:
    """Add ``/`` and the files that it needs below ``/page/``."""
    assets = {
        entry.name: (entry.read_bytes(), MEDIA[suffix])
        for entry in files(__name__).iterdir()
        if (suffix := "." + entry.name.rpartition(".")[2]) in MEDIA
    }
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    async def home(request: Request) -> Response:
        """Give the page."""
        return _asset(request, *assets[HOME])

    @router.get("/page/{name}")
    async def asset(name: str, request: Request) -> Response:
        """Give one of its files."""
        if name not in assets:
            raise HTTPException(404)
        return _asset(request, *assets[name])

    app.include_router(router)


def _asset(request: Request, body: bytes, media: str) -> Response:
    tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    headers = HEADERS | {"ETag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(body, media_type=media, headers=headers)
