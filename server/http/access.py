"""Who may send requests: API keys, the routes without keys, and the web pages whose browsers may ask.

Every route needs a key unless its function is marked with `open_to_all`. For FastAPI's routes, a dependency of the
whole application checks the key. Other parts that were added to the application (mounts, Starlette's routes) have no
such dependency, so `Guard` holds back their answers. Nothing here looks at a URL, because a request's URL is built from
the client's input.
"""

from __future__ import annotations

import contextlib
import ctypes
import hmac
import logging
import os
import re
import stat
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fastapi.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxrank.errors import RequestError
from jaxrank.server.errors import Unauthorized

log = logging.getLogger(__name__)

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])


def open_to_all(endpoint: Endpoint) -> Endpoint:
    """Mark a route's function, so that it needs no key. Put it between the route's decorator and the function."""
    endpoint.__dict__["open_to_all"] = True
    return endpoint


class Access:
    """The keys of a server, and the dependency that checks for one. Without keys, every client may use every route.

    Args:
        keys: The API keys.

    Raises:
        RequestError: A key is empty.
    """

    def __init__(self, keys: Sequence[str] = ()) -> None:
        if not all(key.strip() for key in keys):
            raise RequestError("an API key is empty; give keys of at least one character, or no keys at all")
        self.guarded = bool(keys)
        self._keys = [key.strip().encode() for key in keys]

    async def __call__(self, request: Request) -> None:
        """Let the request pass, or refuse it.

        Raises:
            Unauthorized: The route needs a key, and the request does not carry a valid one.
        """
        if not getattr(request.scope.get("endpoint"), "open_to_all", False):
            self.check(request)
        request.state.admitted = True

    def check(self, request: Request) -> None:
        """Check that the request carries exactly one of the keys, exactly once.

        Every key is compared, in constant time. So the time does not show which key matched, or how much of it.

        Raises:
            Unauthorized: The request does not.
        """
        if not self.guarded:
            return
        given = request.headers.getlist("authorization")
        scheme, _, key = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        matches = [hmac.compare_digest(key.strip().encode("latin-1"), known) for known in self._keys]
        if scheme.lower() != "bearer" or not any(matches):
            raise Unauthorized


class Guard:
    """Holds back answers that `access` has not checked: those of mounts, and of routes without dependencies.

    Args:
        app: The application inside this middleware.
        access: The keys of the server.
    """

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self.app = app
        self.access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refused = False

        async def guarded(message: Message) -> None:
            nonlocal refused
            if message["type"] == "http.response.start" and message["status"] < 400 and not _admitted(scope):
                try:
                    self.access.check(Request(scope))
                except Unauthorized as refusal:
                    refused = True
                    log.error("a route was answered that asks for no key; its answer is held back")
                    await refusal.response()(scope, receive, send)
            if not refused:
                await send(message)

        await self.app(scope, receive, guarded)


def _admitted(scope: Scope) -> bool:
    return scope.get("state", {}).get("admitted", False)


def cross_origin(origins: Sequence[str]) -> list[Middleware]:
    """Return the middleware that lets browsers on pages of these origins send requests.

    Browsers are never allowed to send cookies or their own passwords. So a page has the key only if its user gave it.

    Args:
        origins: "https://host", or "https://host:port", exactly. "*" stands for all origins.

    Returns:
        The middleware. An empty list if there are no origins.

    Raises:
        RequestError: An entry is not an origin.
    """
    for origin in origins:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            raise RequestError(
                f"{origin!r} is not an origin; give https://host or https://host:port, without a path, or * for all"
            )
    if not origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST", "PUT"],
            allow_headers=["Authorization", "Content-Type", "X-Request-Id", "X-Request-Timeout"],
            expose_headers=["Retry-After", "X-Request-Id"],
            allow_credentials=False,
        )
    ]


_ORIGIN = re.compile(r"https?://(?:[a-z0-9.-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?")


def read_keys(file: Path) -> list[str]:
    """Return the keys in a file with one key a line.

    Empty lines and lines that begin with # are skipped. A file that everyone can write is refused, since they could add
    a key. A file that everyone can read causes a warning.

    Args:
        file: The file, in UTF-8.

    Raises:
        RequestError: The file cannot be read, can be written by everyone, or has no key.
    """
    try:
        mode = file.stat().st_mode
        text = file.read_text("utf-8")
    except OSError as error:
        raise RequestError(f"--api-key-file {file}: {error.strerror}; name a file with one key a line") from None
    except UnicodeDecodeError:
        raise RequestError(f"--api-key-file {file} is not UTF-8 text; name a file with one key a line") from None
    if mode & stat.S_IWOTH:
        raise RequestError(f"--api-key-file {file} can be written by everyone; make it yours alone (chmod 600)")
    if mode & stat.S_IROTH:
        log.warning("--api-key-file %s can be read by everyone on this machine; make it yours alone (chmod 600)", file)
    lines = (line.strip() for line in text.removeprefix("\ufeff").splitlines())
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise RequestError(f"--api-key-file {file} has no key; write one a line, or leave the flag out")
    return keys


def hide_from_process_list(secrets: Iterable[str]) -> None:
    """Overwrite these words in this process's command line, as `ps` shows it.

    This works on Linux only; elsewhere nothing happens. Source: proc(5), fields arg_start and arg_end of
    /proc/self/stat.

    Args:
        secrets: The words, such as API keys.
    """
    with contextlib.suppress(OSError, ValueError, IndexError):
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        start, end = int(fields[45]), int(fields[46])
        if not 0 < start < end:
            return
        known = {os.fsencode(secret) for secret in secrets}
        for word in ctypes.string_at(start, end - start).split(b"\0"):
            for secret in known & {word, word.partition(b"=")[2]} - {b""}:
                ctypes.memset(start + len(word) - len(secret), ord("*"), len(secret))
            start += len(word) + 1
