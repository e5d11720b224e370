"""A small web server of raw answers, well-behaved and other, on a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Web:
    """pages: path to the bytes of a whole answer, or what writes it. asked: requests, as they came. open: connections.

    names: what TLS clients asked for.
    """

    pages: dict[str, bytes | Answer] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    open: int = 0
    host: str = ""
    port: int = 0
    names: list[str | None] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            self.asked.append(head)
            page = self.pages.get(head.split(" ")[1], answer(b"nothing here", status="404 Not Found"))
            tasks = [asyncio.ensure_future(_write(page, writer)), asyncio.ensure_future(reader.read())]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)  # or the client leaves
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.open -= 1
            writer.close()


async def _write(page: bytes | Answer, writer: asyncio.StreamWriter) -> None:
    if isinstance(page, bytes):
        writer.write(page)
        await writer.drain()
    else:
        await page(writer)


@contextlib.asynccontextmanager
async def web(
    host: str = "127.0.0.1", port: int = 0, tls: ssl.SSLContext | None = None, **pages: bytes | Answer
) -> AsyncIterator[Web]:
    """Serve pages, by path without the slash, until the block ends."""
    site = Web({f"/{path}": page for path, page in pages.items()}, host=host)
    if tls is not None:
        tls.sni_callback = lambda connection, name, context: site.names.append(name)
    server = await asyncio.start_server(site.handle, host, port, ssl=tls)
    site.port = server.sockets[0].getsockname()[1]
    try:
        yield site
    finally:
        server.close()


def answer(body: bytes = b"", status: str = "200 OK", **headers: str | int) -> bytes:
    """A whole answer; Content-Length as it should be unless it is given, `_` for `-` in names."""
    lines = {"content_length": len(body), "connection": "close"} | headers
    text = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in lines.items() if value != "")
    return f"HTTP/1.1 {status}\r\n{text}\r\n".encode("latin-1") + body


def redirect(place: str) -> bytes:
    return answer(status="302 Found", location=place)


def drip(size: int, pause_s: float, piece: bytes = b"x") -> Answer:
    """An answer that comes a piece at a time."""

    async def write(writer: asyncio.StreamWriter) -> None:
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {size}\r\n\r\n".encode())
        for _ in range(0, size, len(piece)):
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause_s)

    return write
