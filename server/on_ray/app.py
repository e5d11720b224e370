"""The server as an application of Ray Serve. Each replica is a complete server, with a model on its own chips.

    serve run jaxrank.server.on_ray.app:build model=BAAI/bge-reranker-v2-m3 replicas=2 gpus=1

It is an entry point like the `jaxrank` command, and takes the same flags. Nothing else imports it, or Ray. See
docs/deploy.md.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import AsyncIterator, Mapping
from typing import Any, NoReturn

from fastapi import FastAPI
from ray import serve  # pyright: ignore[reportMissingImports]

from jaxrank.cli import serve as command
from jaxrank.cli.numbers import count, seconds
from jaxrank.errors import RequestError
from jaxrank.server import create_app
from jaxrank.server.observe import logs
from jaxrank.server.serve import forget_garbage
from jaxrank.server.service import PATIENCE_S

REFUSED = {
    "api_key": "Ray's dashboard would show it; name a file on every node with api_key_file",
    "host": "Ray's HTTP proxy listens; say where in http_options of a config file",
    "hostname": "Ray's HTTP proxy listens; say where in http_options of a config file",
    "port": "Ray's HTTP proxy listens; say where in http_options of a config file",
    "max_connections": "Ray's HTTP proxy takes the connections; bound them in front of it",
}
"""Flags of `jaxrank serve` that have no meaning here, and what to do instead."""

RETRIES = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"

CHECK_S = 5.0
"""Seconds between two health checks. Ray replaces a replica after three failures in a row."""

log = logging.getLogger(__name__)


def build(arguments: dict[str, Any]) -> Any:
    """Return the application, a ray.serve.Application.

    Args:
        arguments: The flags of `jaxrank serve`, except those in REFUSED. Names have _ or -, without the leading
            hyphens. A flag without a value is true. There are more arguments: replicas, max_replicas,
            target_ongoing_requests, cpus, gpus and tpus. replicas is the number of replicas, or the fewest if
            max_replicas is given. In that case Ray starts and ends replicas, to have target_ongoing_requests under way
            in each. cpus, gpus and tpus are those of each replica, as Ray counts them. shutdown_grace is the time, in
            seconds, for a replica to finish its requests when another replica takes its place.

    Raises:
        RequestError: An argument is not valid.
    """
    asked = read(arguments)
    options: dict[str, Any] = {"num_cpus": asked.cpus, "num_gpus": asked.gpus}
    if asked.tpus:
        options["resources"] = {"TPU": asked.tpus}
    scale: dict[str, Any] = {"num_replicas": asked.replicas}
    if asked.max_replicas is not None:
        scale = {
            "autoscaling_config": {
                "min_replicas": asked.replicas,
                "max_replicas": asked.max_replicas,
                "target_ongoing_requests": asked.target_ongoing_requests,
            }
        }
    deployment = serve.deployment(
        Replica,
        name="jaxrank",
        ray_actor_options=options,
        # the application's own limit is lower and sends Retry-After; the difference leaves room for probes
        max_ongoing_requests=2 * asked.max_queue_requests,
        health_check_period_s=CHECK_S,
        graceful_shutdown_timeout_s=asked.shutdown_grace + PATIENCE_S,
        graceful_shutdown_wait_loop_s=0.5,
        **scale,
    )
    return deployment.bind(dict(arguments))


def read(arguments: Mapping[str, Any]) -> argparse.Namespace:
    """Return `arguments` as parsed flags.

    Raises:
        RequestError: An argument is not valid.
    """
    parser = _Parser(prog="jaxrank.server.on_ray.app:build", add_help=False, allow_abbrev=False)
    command.add_arguments(parser)
    group = parser.add_argument_group("replicas")
    group.add_argument("--replicas", type=count, default=1)
    group.add_argument("--max-replicas", type=count)
    group.add_argument("--target-ongoing-requests", type=count, default=16)
    group.add_argument("--cpus", type=seconds, default=1.0)
    group.add_argument("--gpus", type=seconds, default=0.0)
    group.add_argument("--tpus", type=seconds, default=0.0)
    without_value = {flag for action in parser._actions if action.nargs == 0 for flag in action.option_strings}
    words: list[str] = []
    for name, value in arguments.items():
        key = name.replace("-", "_")
        if key in REFUSED:
            raise RequestError(f"{name} is given; {REFUSED[key]}")
        flag = "--" + key.replace("_", "-")
        if flag not in without_value:
            words.append(f"{flag}={value}")
        elif str(value).lower() == "true":
            words.append(flag)
        elif str(value).lower() != "false":
            raise RequestError(f"{name} is {value}; it must be true or false")
    asked = parser.parse_args(words)
    if asked.max_replicas is not None and asked.max_replicas < asked.replicas:
        raise RequestError(f"max_replicas is {asked.max_replicas}, fewer than the {asked.replicas} replicas")
    return asked


class _Parser(argparse.ArgumentParser):
    """Raises an error in cases where argparse would print it and end the process."""

    def error(self, message: str) -> NoReturn:
        raise RequestError(f"{message}; give what `jaxrank serve --help` lists, or replicas, max_replicas, "
                           "target_ongoing_requests, cpus, gpus, tpus")  # fmt: skip


@serve.ingress()
class Replica:
    """One process with a model and the complete application. Ray gives it requests when it is warm.

    Args:
        arguments: As in build.

    Raises:
        RequestError: An argument is not valid.
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        asked = read(arguments)
        self._log = contextlib.ExitStack()
        self._log.enter_context(logs.to_stderr(asked.log_format))
        if not os.environ.get(RETRIES, "").startswith("jaxrank.server.on_ray.retry:"):
            log.warning("requests on a replica that dies are answered 500, not tried again: see docs/deploy.md")
        settings = command.app_settings(asked)
        self._warm = threading.Event()
        self._failure: BaseException | None = None
        self._app = create_app(command.load(asked), on_ready=self._ready, on_failure=self._failed, **settings)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the application. Its start ends when the model is warm, so Ray sends no requests before."""
        start = self._app.router.lifespan_context

        @contextlib.asynccontextmanager
        async def warm(app: FastAPI) -> AsyncIterator[Any]:
            async with start(app) as state:
                await asyncio.to_thread(self._warm.wait)
                if self._failure is not None:
                    raise self._failure
                yield state

        self._app.router.lifespan_context = warm
        return self._app

    def _ready(self) -> None:
        forget_garbage()
        self._warm.set()

    def _failed(self, error: BaseException) -> None:
        self._failure = error
        self._warm.set()

    async def check_health(self) -> None:
        """Check whether the replica should be replaced.

        Raises:
            RuntimeError: Scoring has stopped, or nothing could be scored in the last batches.
        """
        scheduler = self._app.state.service.scheduler
        if scheduler.failed or scheduler.failing:
            raise RuntimeError("scoring has stopped, or nothing could be scored in the last batches: see the log")
