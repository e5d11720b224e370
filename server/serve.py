"""Run the application in this process until a signal ends it."""

from __future__ import annotations

import contextlib
import gc
import logging
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

from jaxrank.server.app import create_app
from jaxrank.server.http.connections import Config, Server, allow_open_files
from jaxrank.server.observe import logs
from jaxrank.server.served_model import ServedModel

log = logging.getLogger(__name__)


def serve(
    reranker: ServedModel,
    host: str = "127.0.0.1",
    port: int = 30000,
    *,
    shutdown_grace_s: float = 30.0,
    max_connections: int = 1000,
    head_timeout_s: float = 15.0,
    write_timeout_s: float = 60.0,
    max_header_bytes: int = 32_768,
    log_format: str = "text",
    **settings: Any,
) -> int:
    """Serve `reranker` on host:port until Ctrl-C or SIGTERM, then finish the accepted requests.

    Args:
        reranker: The model.
        host: The address to listen on.
        port: The port to listen on. 0 picks a free port, and the log names it.
        shutdown_grace_s: Seconds to finish in at the end. The requests that are left after that are answered 503.
        max_connections: See connections.Config.
        head_timeout_s: See connections.Config.
        write_timeout_s: See connections.Config.
        max_header_bytes: Most bytes of the address and the headers of one request.
        log_format: "text" or "json".
        **settings: More arguments of create_app.

    Returns:
        0, the exit status.

    Raises:
        RequestError: A setting is not valid.
        SystemExit: The port is not available, or the model cannot be warmed up, or scoring stopped for good. Its text
            is the reason, so the exit status is 1.
        ValueError: log_format is unknown.
    """
    failures: list[BaseException] = []

    def stop(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    with logs.to_stderr(log_format), contextlib.closing(_listen(host, port)) as listener:
        told = {"on_ready": forget_garbage, "on_failure": stop}
        app = create_app(reranker, max_header_bytes=max_header_bytes, **told, **settings)
        config = Config(
            app,
            max_connections=max_connections,
            max_header_bytes=max_header_bytes,
            head_timeout_s=head_timeout_s,
            write_timeout_s=write_timeout_s,
            shutdown_grace_s=shutdown_grace_s,
        )
        allow_open_files(max_connections)
        server = Server(config)
        log.info("listening on %s port %d", *listener.getsockname()[:2])
        with contextlib.suppress(KeyboardInterrupt), _sigterm_as_ctrl_c():
            server.run(sockets=[listener])
        log.info("stopped")
    if failures:
        raise SystemExit(f"jaxrank: scoring stopped: {type(failures[0]).__name__}: {failures[0]}")
    return 0


def forget_garbage() -> None:
    """Exclude all present objects from Python's garbage collection.

    JAX's objects and the models' objects live as long as the process. To look at all of them would stop the event loop
    for 0.3 s again and again.
    """
    gc.collect()
    gc.freeze()


def _listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on host:port.

    Raises:
        SystemExit: The socket cannot listen there.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(2048)  # from here on clients wait, and are not turned away
    except (OSError, OverflowError) as error:
        listener.close()
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise SystemExit(
            f"jaxrank: cannot listen on {host} port {port}: {reason}. Choose another port, or stop what uses this one."
        ) from None
    return listener


@contextlib.contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Let SIGTERM also raise KeyboardInterrupt after the drain, so that both signals end with exit status 0."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
