"""uvicorn with limits: for the number of connections, for the time of headers, and for the time of a shutdown."""

from __future__ import annotations

import asyncio
import resource
import signal
import socket
from types import FrameType
from typing import Any, cast

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

FILES_BESIDE = 256
"""Open files of the process that are not connections."""

LAST_WORDS_S = 2.0
"""Seconds for answers to reach their clients after the grace of a shutdown."""


class Config(uvicorn.Config):
    """The settings of the server.

    Args:
        app: The application.
        max_connections: Most connections at the same time.
        max_header_bytes: Most bytes in the headers of one request.
        head_timeout_s: Seconds until the headers are complete. They count from the connection's opening, or from a
            request's first byte.
        write_timeout_s: Seconds for a client to receive the data that is sent.
        shutdown_grace_s: Seconds to finish the accepted requests.
        **settings: More arguments of uvicorn.Config.
    """

    def __init__(
        self,
        app: FastAPI,
        *,
        max_connections: int = 1000,
        max_header_bytes: int = 32_768,
        head_timeout_s: float = 15.0,
        write_timeout_s: float = 60.0,
        shutdown_grace_s: float = 30.0,
        **settings: Any,
    ) -> None:
        super().__init__(
            app,
            http=Connection,
            h11_max_incomplete_event_size=max_header_bytes,
            log_config=None,
            log_level="warning",
            access_log=False,  # the application writes its own log, without user text
            server_header=False,
            proxy_headers=False,
            ws="none",
            lifespan="on",
            **settings,
        )
        self.service = app.state.service
        self.max_connections = max_connections
        self.head_timeout_s = head_timeout_s
        self.write_timeout_s = write_timeout_s
        self.shutdown_grace_s = shutdown_grace_s


class Connection(H11Protocol):
    """One client's connection."""

    config: Config

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Refuse a connection above the limit, or start its timers."""
        super().connection_made(transport)
        self._head_timer: asyncio.TimerHandle | None = None
        if len(self.connections) > self.config.max_connections:
            self._refuse(503, "Too many connections. Try again soon.", "TooManyConnections")
            return
        opened = transport.get_extra_info("socket")
        if opened is not None and hasattr(socket, "TCP_USER_TIMEOUT"):
            milliseconds = int(self.config.write_timeout_s * 1000)
            opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        """Handle data, and stop the timer when the headers are complete."""
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._expect_head()
        else:
            self._forget_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer of a closed connection."""
        self._forget_timer()
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        """Start the timer, unless it runs already or the connection is between two requests."""
        if self._head_timer is None and self.timeout_keep_alive_task is None:
            self._head_timer = self.loop.call_later(self.config.head_timeout_s, self._head_is_late)

    def _forget_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        if not self.transport.is_closing():
            self._refuse(408, "The request's headers did not arrive in time.", "SlowHead")

    def _refuse(self, status: int, message: str, reason: str) -> None:
        """Send the refusal and close. There is no request yet, so the application cannot answer."""
        self.config.service.metrics.refusal(reason)
        body = message.encode()
        head = f"HTTP/1.1 {status} {reason}\r\nContent-Type: text/plain\r\nContent-Length: {len(body)}\r\n"
        self.transport.write(head.encode() + b"Retry-After: 1\r\nConnection: close\r\n\r\n" + body)
        self.transport.close()


class Server(uvicorn.Server):
    """Stops as docs/operations.md describes: finishes accepted requests within the grace, and answers the rest 503."""

    config: Config

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening, wait until the gate is empty, and close the connections that are left."""
        ending = asyncio.create_task(self._end_connections())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    async def _end_connections(self) -> None:
        await self.config.service.gate.empty(self.config.shutdown_grace_s)
        await asyncio.sleep(LAST_WORDS_S)
        for connection in list(self.server_state.connections):
            cast(Connection, connection).transport.abort()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End the process cleanly at the first signal, and at once at a second Ctrl-C."""
        if self.should_exit and sig == signal.SIGINT:
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        super().handle_exit(sig, frame)


def allow_open_files(connections: int) -> None:
    """Raise the process's limit of open files to what the connections need, as far as the system allows.

    Args:
        connections: Most connections at the same time.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + FILES_BESIDE
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
