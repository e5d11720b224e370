"""Run the application in this process until a signal ends it."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

import uvicorn

from jaxrank.server.app import Scorer, create_app

log = logging.getLogger(__name__)


def serve(reranker: Scorer, host: str = "127.0.0.1", port: int = 30000, *, drain_s: int = 30, **settings: Any) -> int:
    """Serve `reranker` on host:port until Ctrl-C or SIGTERM, then finish what was accepted and return 0.

    port: 0 picks a free one, which the log names. drain_s: most seconds to finish in. settings: as create_app takes
    them. Raises SystemExit, with the reason as its text and so status 1, when the port cannot be had or the model
    cannot be warmed up.
    """
    failures: list[BaseException] = []

    def stop(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    with _log_to_stderr(), contextlib.closing(_listen(host, port)) as listener:
        app = create_app(reranker, on_failure=stop, **settings)
        config = uvicorn.Config(
            app,
            log_config=None,
            log_level="warning",
            access_log=False,  # the application writes its own, without user text
            server_header=False,
            proxy_headers=False,
            ws="none",
            lifespan="on",
            timeout_graceful_shutdown=drain_s,
        )
        server = uvicorn.Server(config)
        log.info("listening on %s port %d", *listener.getsockname()[:2])
        with contextlib.suppress(KeyboardInterrupt), _sigterm_as_ctrl_c():
            server.run(sockets=[listener])
        log.info("stopped")
    if failures:
        raise SystemExit(f"jaxrank: scoring stopped: {type(failures[0]).__name__}: {failures[0]}")
    return 0


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens on host:port. Raises SystemExit."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(2048)  # from here on clients wait rather than being turned away
    except (OSError, OverflowError) as error:
        listener.close()
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise SystemExit(
            f"jaxrank: cannot listen on {host} port {port}: {reason}. Choose another port, or stop what uses this one."
        ) from None
    return listener


@contextlib.contextmanager
def _log_to_stderr() -> Iterator[None]:
    """Show the server's log lines, unless the program has set up logging itself."""
    logger = logging.getLogger("jaxrank")
    if logger.hasHandlers():
        yield
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@contextlib.contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Let SIGTERM, too, end in KeyboardInterrupt after the drain, so that both end with exit status 0."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
