"""Connections to public addresses only. Names are resolved here, and connections go to the checked addresses.

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
"""Turns host and port into numeric addresses, best first. It raises OSError if there are none."""


class NotPublicError(Exception):
    """A host has an address that is not on the public internet."""


class SystemResolver:
    """The system's way to look up names, on its own threads.

    If a name's server does not answer, a look-up holds a thread for half a minute. The rest of the program does not
    need these threads.

    Args:
        threads: The number of threads.
    """

    def __init__(self, threads: int = 32) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="jaxrank-resolve")

    async def __call__(self, host: str, port: int) -> list[str]:
        """Return the addresses of a host.

        Raises:
            OSError: The host has no address.
            UnicodeError: The host cannot be a name.
        """
        look_up = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        found = await asyncio.get_running_loop().run_in_executor(self._threads, look_up)
        return list(dict.fromkeys(str(entry[4][0]) for entry in found))

    def close(self) -> None:
        """Accept no more look-ups."""
        self._threads.shutdown(wait=False, cancel_futures=True)


NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
UNICAST = ipaddress.IPv6Network("2000::/3")
"""The part of IPv6 that is assigned. Python's "global" also includes addresses that are not assigned, and the old
site-local addresses.
"""

SPECIAL = [
    ipaddress.ip_network(text)
    for text in (
        "192.0.0.0/24",  # protocol assignments; older Pythons know a part of them; a cloud's metadata are here
        "192.88.99.0/24",  # relays of 6to4
        "168.63.129.16/32",  # a public number, but in Azure the machine's own host answers
        "2001::/23",  # protocol assignments
        "3fff::/20",  # documentation
    )
]


def is_public(address: str) -> bool:
    """Return whether packets to this address leave for the public internet.

    Args:
        address: A numeric IPv4 or IPv6 address. Any other text is not public.
    """
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
    """Opens httpcore's connections after a check of their addresses. TLS still names the requested host.

    If a host has both public and other addresses, it is refused. No one needs such a host, and attackers use one to
    change the address between check and use.

    Args:
        resolver: Looks up hosts.
        private: Whether any address is accepted.

    Raises:
        NotPublicError: Raised out of a request whose host has an address that is not public.
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
        """Connect to the first address of the host that answers, after a check of all its addresses.

        Raises:
            ConnectError: No address answers.
            NotPublicError: An address of the host is not public, and private is not set.
            OSError: The host has no address.
            UnicodeError: The host cannot be a name.
        """
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
"""Most addresses of a host that are tried, so that a name with a thousand addresses cannot misuse this server."""
