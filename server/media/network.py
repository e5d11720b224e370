"""Connections to public addresses only: names are resolved here, and what was checked is what is connected to.

Sources: the registries of special addresses (RFC 6890, as Python's ipaddress has them) and the ways in which IPv6
addresses carry IPv4 ones (RFC 4291 mapped, RFC 3056 6to4, RFC 4380 Teredo, RFC 6052 NAT64).
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, cast

import httpcore2

Resolver = Callable[[str, int], Awaitable[Sequence[str]]]
"""Host and port to addresses in digits, best first. Raises OSError where there are none."""


class NotPublicError(Exception):
    """A host has an address that is not on the public internet."""


class SystemResolver:
    """The system's way to look up names, on threads of its own.

    A name whose server is silent holds a thread for half a minute: not one of those that the rest of the program needs.
    """

    def __init__(self, threads: int = 32) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="jaxrank-resolve")

    async def __call__(self, host: str, port: int) -> list[str]:
        """Raises OSError, or UnicodeError for what cannot be a name."""
        look_up = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        found = await asyncio.get_running_loop().run_in_executor(self._threads, look_up)
        return list(dict.fromkeys(str(entry[4][0]) for entry in found))

    def close(self) -> None:
        """Look up nothing more."""
        self._threads.shutdown(wait=False, cancel_futures=True)


NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
UNICAST = ipaddress.IPv6Network("2000::/3")
"""All that is given out of IPv6; Python also calls global what is not given out, and the old site-local addresses."""

SPECIAL = [
    ipaddress.ip_network(text)
    for text in (
        "192.0.0.0/24",  # protocol assignments, of which older Pythons know a part; a cloud's metadata are here
        "192.88.99.0/24",  # relays of 6to4
        "168.63.129.16/32",  # public by its number, but answered by the machine's own host in Azure
        "2001::/23",  # protocol assignments
        "3fff::/20",  # documentation
    )
]


def is_public(address: str) -> bool:
    """Whether packets to this address, in digits, leave for the public internet."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address):
        inner = [parsed.ipv4_mapped, parsed.sixtofour, *(parsed.teredo or ())]
        if parsed in NAT64:
            inner.append(ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF))
        carried = [item for item in inner if item is not None]
        if carried:
            return all(is_public(str(item)) for item in carried)
        if parsed not in UNICAST:
            return False
    return (
        parsed.is_global
        and not parsed.is_multicast
        and not parsed.is_reserved
        and not parsed.is_unspecified
        and not any(parsed in network for network in SPECIAL)
    )


class CheckedBackend(httpcore2.AsyncNetworkBackend):
    """Opens httpcore's connections, after looking at where they lead; TLS still names the host that was asked for.

    private: take any address. Raises NotPublicError out of the request. A host of which one address is public and
    another is not is refused: nobody needs one, and it is how names are switched between check and use.
    """

    def __init__(self, resolver: Resolver, private: bool = False) -> None:
        self.private = private
        self.resolver = resolver
        self.inner = cast(httpcore2.AsyncNetworkBackend, httpcore2.AnyIOBackend())

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        addresses = await self.resolver(host, port)
        if not self.private and not all(map(is_public, addresses)):
            raise NotPublicError
        for address in addresses[:MOST_TRIED]:
            try:
                return await self.inner.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout):
                continue
        raise httpcore2.ConnectError


MOST_TRIED = 4
"""Addresses of a host that are tried, so that a name with a thousand of them is no way to use this server."""
