"""The page at /: one HTML file. Its policy lets a browser run the page's own script and call the page's own server."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from fastapi import APIRouter, Request, Response

from jaxrank.server.dialects.resolve import DIALECTS
from jaxrank.server.errors import NotFound
from jaxrank.server.http.access import open_to_all

_HTML = Path(__file__).with_name("page.html").read_text("utf-8")


def _hashes(tag: str) -> str:
    """Return the sources of Content-Security-Policy (https://www.w3.org/TR/CSP3/) for the file's own `tag` elements."""
    contents = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", _HTML, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(c.encode()).digest()).decode()}'" for c in contents)


HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; script-src {_hashes('script')}; style-src {_hashes('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def routes() -> APIRouter:
    """Return the route GET /.

    It needs no key. The page is the same for every client, and its own requests need a key. There is no page under a
    dialect's prefix, since the answers there have another form than the page reads.
    """
    router = APIRouter()

    @router.get("/", include_in_schema=False)
    @open_to_all
    async def page(request: Request) -> Response:
        if request.scope.get("root_path", "").rpartition("/")[2] in DIALECTS:
            raise NotFound("There is no page under a dialect's prefix. Open / instead.")
        return Response(_HTML, headers=HEADERS, media_type="text/html")

    return router
