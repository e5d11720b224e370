"""Fetches the bytes of media: from data: URLs, from the public web, and from what else the operator allows.

The defaults are safe. Every address is parsed once, here, and connections use only the parsed parts. A client learns
nothing of another server's answer, except that it was of no use.

Sources: RFC 3986 and 2397 for addresses, OWASP's Server-Side Request Forgery Prevention Cheat Sheet for what to refuse.
"""

from __future__ import annotations

import asyncio
import base64
import os
import re
import ssl
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from urllib.parse import quote, unquote, urljoin, urlsplit

import httpcore2

from jaxrank.errors import MediaError
from jaxrank.server.media.network import CheckedBackend, NotPublicError, Resolver, SystemResolver
from jaxrank.version import __version__


@dataclass(frozen=True)
class MediaAccess:
    """Where media may come from, and how much of them.

    Args:
        remote: Whether http and https are allowed at all.
        domains: If there are any, only these hosts are allowed, exactly.
        private: Whether addresses that are not public are allowed too, and any port.
        ports: The allowed ports, unless private is set.
        folder: Requests may name files in it, by file: URL or by path. None for no files.
        max_items: Most images and videos in one request. Every frame of a listed video counts.
        max_bytes: Most bytes of one of them.
        max_request_bytes: Most bytes of all of them, encoded.
        max_patch_bytes: Most bytes of all of them, decoded.
        max_redirects: Most redirects for one address.
        connect_s: Seconds to connect.
        idle_s: Seconds between two pieces of an answer.
        total_s: Seconds for one address, with its redirects.
        at_once: Fetches of one request at the same time.
    """

    remote: bool = True
    domains: tuple[str, ...] = ()
    private: bool = False
    ports: tuple[int, ...] = (80, 443)
    folder: Path | None = None
    max_items: int = 256
    max_bytes: int = 20_000_000
    max_request_bytes: int = 200_000_000
    max_patch_bytes: int = 4 * 2**30
    max_redirects: int = 3
    connect_s: float = 5.0
    idle_s: float = 5.0
    total_s: float = 20.0
    at_once: int = 8

    def refusal(self, code: str) -> MediaError:
        """Return the error for one of REASONS."""
        return MediaError(code, REASONS[code].format(self))


REASONS = {
    "bad_address": "not an address that can be read; send an http or https URL, or data:TYPE;base64,DATA",
    "bad_data": "not a data: URL in base64; send data:TYPE;base64,DATA",
    "bad_port": "at a port other than 80 and 443; serve it there, or send it as data:TYPE;base64,DATA",
    "bad_file": "not a file that this server may read",
    "no_files": "a file name, and this server reads no files; send data:TYPE;base64,DATA",
    "no_remote": "a web address, and this server fetches nothing; send data:TYPE;base64,DATA",
    "other_domain": "on a host that this server does not fetch from; send data:TYPE;base64,DATA",
    "not_public": "on a host that is not on the public internet; send data:TYPE;base64,DATA",
    "unreachable": "at an address from which it could not be fetched",
    "too_slow_to_fetch": "at an address that answers too slowly, with {0.total_s:g} seconds for all of it",
    "too_many_redirects": "at an address that redirects more than {0.max_redirects} times",
    "compressed": "sent with a Content-Encoding by its server; serve it as it is",
    "too_many_bytes": "larger than {0.max_bytes:,} bytes; send a smaller file",
    "too_many_items": "one of more than {0.max_items:,} images and videos in one request; send several requests",
    "too_many_request_bytes": "one of several files larger than {0.max_request_bytes:,} bytes together; send fewer",
    "too_many_patch_bytes": "one of several that are too large together; send fewer in one request, or smaller ones",
}
"""The reasons to refuse an address, by code."""

Take = Callable[[int], None]
"""Called with the number of bytes that are about to be kept. It raises MediaError if they are too many."""


@dataclass(frozen=True)
class Web:
    """An http or https address in its parts."""

    url: str
    scheme: str
    host: str
    port: int
    target: str

    @property
    def authority(self) -> str:
        """The value of the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"


DEFAULT_PORTS = {"http": 80, "https": 443}
MOST_CHARACTERS = 8192
_UNSAFE = re.compile(r"[\x00-\x20\x7f\\]")
_HOST = re.compile(r"[a-z0-9_.:-]{1,253}")


class Fetcher:
    """Fetches media within `access`, each over its own connection. For one event loop.

    Args:
        access: Where media may come from.
        resolver: Looks up hosts. By default the system's resolver.
        tls: The certificates to trust. By default those of the system's authorities.
    """

    def __init__(
        self, access: MediaAccess, resolver: Resolver | None = None, tls: ssl.SSLContext | None = None
    ) -> None:
        self.access = access
        self._folder = access.folder.resolve() if access.folder else None
        self._domains = frozenset(_plain_host(domain) for domain in access.domains)
        self._resolver = resolver or SystemResolver()
        self._pool = httpcore2.AsyncConnectionPool(
            ssl_context=tls,
            max_connections=64,
            max_keepalive_connections=0,  # if a server closes a kept connection, the next fetch fails
            network_backend=CheckedBackend(self._resolver, access.private),
        )

    async def __aenter__(self) -> Fetcher:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections."""
        await self._pool.aclose()
        if isinstance(self._resolver, SystemResolver):
            self._resolver.close()

    def check(self, address: str) -> None:
        """Refuse an address that fetch would refuse in any case. It reads no file and connects to no server.

        Raises:
            MediaError: The address is refused.
        """
        scheme = _scheme(address)
        if scheme == "data":
            self._base64_at(address)
        elif scheme in DEFAULT_PORTS:
            self._parse(address)
        elif scheme in ("file", ""):
            self._path_of(address)
        else:
            raise self.access.refusal("bad_address")

    async def fetch(self, address: str, take: Take = lambda size: None) -> bytes:
        """Return the bytes at an address. Cancelling it ends the connection.

        Args:
            address: A data: URL, an http or https URL, a file: URL, or a path.
            take: Called with the number of bytes that are about to be kept.

        Raises:
            MediaError: The address is refused, cannot be fetched, or has too many bytes.
        """
        self.check(address)
        scheme = _scheme(address)
        if scheme in DEFAULT_PORTS:
            return await self._remote(address, take)
        if scheme == "data":
            take((len(address) - self._base64_at(address)) // 4 * 3)
            return await asyncio.to_thread(self._data, address)
        content = await asyncio.to_thread(self._file, address)
        take(len(content))
        return content

    def _base64_at(self, address: str) -> int:
        """Return where the base64 of a data: URL begins, and refuse data that are too long."""
        start = address.find(",", 0, MOST_CHARACTERS) + 1
        if not start or not address[: start - 1].lower().endswith(";base64"):
            raise self.access.refusal("bad_data")
        if (len(address) - start) // 4 * 3 - address.count("=", max(start, len(address) - 2)) > self.access.max_bytes:
            raise self.access.refusal("too_many_bytes")
        return start

    def _data(self, address: str) -> bytes:
        start = self._base64_at(address)
        try:
            return base64.b64decode(address[start:], validate=True)
        except ValueError:
            raise self.access.refusal("bad_data") from None

    def _path_of(self, address: str) -> Path:
        """Return the path that a file: URL or a path names. Relative paths are within the folder."""
        if self._folder is None:
            raise self.access.refusal("no_files")
        if _UNSAFE.search(address.replace(" ", "")) or len(address) > MOST_CHARACTERS:
            raise self.access.refusal("bad_file")
        if _scheme(address) == "file":
            parts = urlsplit(address)
            if parts.netloc not in ("", "localhost"):
                raise self.access.refusal("bad_file")
            address = unquote(parts.path)
        return self._folder / address

    def _file(self, address: str) -> bytes:
        assert self._folder is not None
        try:
            path = self._path_of(address).resolve(strict=True)
            if not path.is_relative_to(self._folder):
                raise self.access.refusal("bad_file")
            # open before the check, and without waiting: a pipe would block, and a device would never end
            with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW), "rb") as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise self.access.refusal("bad_file")
                if status.st_size > self.access.max_bytes:
                    raise self.access.refusal("too_many_bytes")
                return file.read(status.st_size)
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: the links form a circle
            raise error if isinstance(error, MediaError) else self.access.refusal("bad_file") from None

    def _parse(self, url: str) -> Web:
        """Split an http or https address into its parts.

        Raises:
            MediaError: The address is not plain, or not allowed.
        """
        if not self.access.remote:
            raise self.access.refusal("no_remote")
        try:
            parts = urlsplit(url)
            host, port = _plain_host(parts.hostname or ""), parts.port
        except ValueError:
            raise self.access.refusal("bad_address") from None
        scheme = parts.scheme.lower()
        odd = _UNSAFE.search(url) or len(url) > MOST_CHARACTERS or "@" in parts.netloc
        if odd or scheme not in DEFAULT_PORTS or not _HOST.fullmatch(host) or port == 0:
            raise self.access.refusal("bad_address")
        port = DEFAULT_PORTS[scheme] if port is None else port
        if self._domains and host not in self._domains:
            raise self.access.refusal("other_domain")
        if port not in self.access.ports and not self.access.private:
            raise self.access.refusal("bad_port")
        safe = "/%:@!$&'()*+,;=~?"
        target = quote(parts.path or "/", safe=safe) + (f"?{quote(parts.query, safe=safe)}" if parts.query else "")
        return Web(url, scheme, host, port, target)

    async def _remote(self, url: str, take: Take) -> bytes:
        try:
            async with asyncio.timeout(self.access.total_s):
                for _ in range(self.access.max_redirects + 1):
                    answer = await self._ask(self._parse(url), take)
                    if isinstance(answer, bytes):
                        return answer
                    url = answer
                raise self.access.refusal("too_many_redirects")
        except (TimeoutError, httpcore2.TimeoutException):
            raise self.access.refusal("too_slow_to_fetch") from None
        except NotPublicError:
            raise self.access.refusal("not_public") from None
        except (httpcore2.NetworkError, httpcore2.ProtocolError, OSError, UnicodeError):
            raise self.access.refusal("unreachable") from None

    async def _ask(self, web: Web, take: Take) -> bytes | str:
        """Return the body, or the address of a redirect."""
        access = self.access
        headers = [
            ("Host", web.authority),
            ("Accept", "image/*, video/*"),
            ("Accept-Encoding", "identity"),
            ("Connection", "close"),
            ("User-Agent", f"jaxrank/{__version__}"),
        ]
        timeouts = {"connect": access.connect_s, "read": access.idle_s, "write": access.idle_s, "pool": access.total_s}
        place = httpcore2.URL(scheme=web.scheme, host=web.host, port=web.port, target=web.target)
        async with self._pool.stream("GET", place, headers=headers, extensions={"timeout": timeouts}) as response:
            told = {name.lower().decode("latin-1"): value.decode("latin-1") for name, value in response.headers}
            if response.status in (301, 302, 303, 307, 308) and "location" in told:
                try:
                    return urljoin(web.url, told["location"])
                except ValueError:
                    raise access.refusal("unreachable") from None
            if response.status != 200:
                raise access.refusal("unreachable")
            if told.get("content-encoding", "identity").strip().lower() not in ("identity", ""):
                raise access.refusal("compressed")
            length = told.get("content-length", "")
            if length.isdecimal() and int(length[:20]) > access.max_bytes:
                raise access.refusal("too_many_bytes")
            return await self._read(response, take)

    async def _read(self, response: httpcore2.Response, take: Take) -> bytes:
        chunks: list[bytes] = []
        received = 0
        async for chunk in response.aiter_stream():
            received += len(chunk)
            if received > self.access.max_bytes:
                raise self.access.refusal("too_many_bytes")
            take(len(chunk))
            chunks.append(chunk)
        return b"".join(chunks)


def _scheme(address: str) -> str:
    """Return the text before the first colon, in lower case. It is empty for a path without a scheme."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", address)
    return match[1].lower() if match else ""


def _plain_host(host: str) -> str:
    """Return a host in lower-case ASCII, without the dot that may end it.

    Raises:
        ValueError: It is not a host name.
    """
    host = host.lower() if host.isascii() else host.encode("idna").decode("ascii").lower()
    return host.removesuffix(".")
