"""Fetching media over real sockets: what is fetched, and above all what is not."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import os
import shutil
import ssl
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from jaxrank.errors import MediaError
from jaxrank.server.media import network
from jaxrank.server.media.fetch import REASONS, Fetcher, MediaAccess
from jaxrank.server.media.network import is_public
from tests.server.web import Web, answer, drip, redirect, web

LOCAL = MediaAccess(private=True)


def fetch(address: str, access: MediaAccess = LOCAL, **options: Any) -> bytes:
    """What an address gives."""

    async def work() -> bytes:
        async with Fetcher(access, **options) as fetcher:
            return await fetcher.fetch(address)

    return asyncio.run(work())


def refused(address: str, access: MediaAccess = MediaAccess(), **options: Any) -> str:  # noqa: B008
    """The code with which an address is refused; the text is the constant one."""
    with pytest.raises(MediaError) as caught:
        fetch(address, access, **options)
    assert str(caught.value) == REASONS[caught.value.code].format(access)
    return caught.value.code


async def code_of(site: Web, path: str, access: MediaAccess = LOCAL, **options: Any) -> str:
    """The code with which a page of a site is refused, or "" and the page is fetched."""
    async with Fetcher(access, **options) as fetcher:
        (outcome,) = await asyncio.gather(fetcher.fetch(f"{site.url}/{path}"), return_exceptions=True)
    if isinstance(outcome, bytes):
        return ""
    assert isinstance(outcome, MediaError)
    assert str(outcome) == REASONS[outcome.code].format(access)
    return outcome.code


class Resolving:
    """A resolver that gives one answer after the other, the last for ever."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self.left = list(answers)
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        return self.left.pop(0) if len(self.left) > 1 else self.left[0]


PRIVATE = [
    "127.0.0.1", "127.1", "2130706433", "0x7f000001", "0x7f.0.0.1", "0177.0.0.1", "0.0.0.0", "0", "localhost",
    "LOCALHOST.", "127.255.255.254", "[::1]", "[::]", "[0:0:0:0:0:0:0:1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]",
    "[::127.0.0.1]", "[64:ff9b::7f00:1]", "[64:ff9b::a00:1]", "[64:ff9b:1::7f00:1]", "[2002:7f00:1::]",
    "[2001:0:808:808:0:0:80ff:fffe]", "[fe80::1]", "[fc00::1]", "[fec0::1]", "[ff02::1]", "[2001:db8::1]",
    "10.0.0.1", "172.16.0.1", "192.168.1.1", "100.64.0.1", "100.100.100.200", "169.254.169.254", "192.0.0.192",
    "198.18.0.1", "192.0.2.1", "224.0.0.1", "240.0.0.1", "255.255.255.255", "168.63.129.16", "①②⑦.⓪.⓪.①",
]  # fmt: skip


class TestPrivate:
    def test_refused(self) -> None:
        async def work() -> None:
            async with contextlib.AsyncExitStack() as sites:
                site = await sites.enter_async_context(web(x=answer(b"secret")))
                asked = [site.asked]
                with contextlib.suppress(OSError):  # not every machine has IPv6
                    other = await sites.enter_async_context(web("::1", port=site.port, x=answer(b"secret")))
                    asked.append(other.asked)
                access = MediaAccess(ports=(site.port,), connect_s=1, total_s=3)
                for host in PRIVATE:
                    async with Fetcher(access) as fetcher:
                        with pytest.raises(MediaError) as caught:
                            await fetcher.fetch(f"http://{host}:{site.port}/x")
                    assert caught.value.code == "not_public", host
                assert not any(asked)
                for host in ("127.0.0.1", "2130706433", "127.1"):  # the same server, once it is allowed
                    async with Fetcher(LOCAL) as fetcher:
                        assert await fetcher.fetch(f"http://{host}:{site.port}/x") == b"secret"

        asyncio.run(work())

    @pytest.mark.parametrize("found", [["10.0.0.7"], ["93.184.216.34", "10.0.0.7"], ["::ffff:10.0.0.7"], ["fe80::1%1"]])
    def test_names(self, found: list[str]) -> None:
        for scheme in ("http", "https"):
            assert refused(f"{scheme}://inside.example/x", resolver=Resolving(found)) == "not_public"

    @pytest.mark.parametrize(
        "address", ["93.184.216.34", "8.8.8.8", "2606:4700::1111", "64:ff9b::808:808", "2002:808:808::1"]
    )
    def test_public(self, address: str) -> None:
        assert is_public(address)

    def test_not_an_address(self) -> None:
        assert not is_public("example.com")

    def test_what_was_checked_is_connected_to(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A name that means another machine the second time: there is no second time."""
        monkeypatch.setattr(network, "is_public", lambda address: address == "127.0.0.2")

        async def work() -> None:
            async with (
                web("127.0.0.2", x=answer(b"public")) as public,
                web(port=public.port, x=answer(b"in")) as inside,
            ):
                resolver = Resolving(["127.0.0.2"], ["127.0.0.1"])
                access = MediaAccess(ports=(public.port,))
                async with Fetcher(access, resolver=resolver) as fetcher:
                    address = f"http://rebind.example:{public.port}/x"
                    assert await fetcher.fetch(address) == b"public"
                    assert resolver.asked == ["rebind.example"]
                    with pytest.raises(MediaError) as caught:
                        await fetcher.fetch(address)
                    assert caught.value.code == "not_public"
                assert inside.asked == []
                assert public.asked[0].splitlines()[1].lower() == f"host: rebind.example:{public.port}"

        asyncio.run(work())

    def test_redirects_inside(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(network, "is_public", lambda address: address == "127.0.0.2")

        async def work() -> None:
            async with web("127.0.0.2") as public, web(port=public.port, x=answer(b"secret")) as inside:
                access = MediaAccess(ports=(public.port,), folder=Path("/etc"))
                for place, code in {
                    inside.url + "/x": "not_public",
                    f"//127.0.0.1:{public.port}/x": "not_public",
                    f"http://[::ffff:127.0.0.1]:{public.port}/x": "not_public",
                    "http://127.0.0.1:22/": "bad_port",
                    "file:///etc/passwd": "bad_address",
                    "data:;base64,aGk=": "bad_address",
                    "gopher://127.0.0.1/": "bad_address",
                    "http://a\\@127.0.0.1/": "bad_address",
                    "http://[": "unreachable",
                }.items():
                    public.pages["/go"] = redirect(place)
                    assert await code_of(public, "go", access) == code, place
                assert inside.asked == []

        asyncio.run(work())


class TestAddresses:
    @pytest.mark.parametrize(
        "address",
        [
            "http://example.com\\@127.0.0.1/", "http://user@example.com/", "http://user:word@example.com/",
            "http://exa mple.com/", "http://example.com/a b", "http://example.com/\n", " http://example.com/",
            "http://exam\tple.com/", "http:///x", "http://", "http:x", "http://[::1/", "http://host:99999/",
            "http://host:0/", "http://host:-1/", "http://%31%32%37.0.0.1/", "http://[fe80::1%25lo]/", "ftp://example.com/",
            "javascript:alert(1)", "http://" + "a" * 300 + "/", "http://example.com/" + "a" * 9000, "jar:http://x/",
        ],
    )  # fmt: skip
    def test_not_plain(self, address: str) -> None:
        assert refused(address) == ("no_files" if address.startswith(" ") else "bad_address")

    def test_ports(self) -> None:
        assert refused("http://example.com:22/") == "bad_port"
        assert refused("https://example.com:8443/x") == "bad_port"

    def test_domains(self) -> None:
        access = MediaAccess(domains=("Images.example", "bücher.example"))
        resolver = Resolving(["10.0.0.1"])
        for host in ("images.example", "IMAGES.EXAMPLE.", "bücher.example", "xn--bcher-kva.example"):
            assert refused(f"https://{host}/x", access, resolver=resolver) == "not_public"  # the domain is let through
        for host in ("example", "evil.images.example", "images.example.evil", "127.0.0.1"):
            assert refused(f"https://{host}/x", access, resolver=resolver) == "other_domain"

    def test_no_remote(self) -> None:
        assert refused("https://example.com/x", MediaAccess(remote=False)) == "no_remote"
        assert fetch("data:;base64,aGk=", MediaAccess(remote=False)) == b"hi"

    def test_what_is_sent(self) -> None:
        async def work() -> None:
            async with web(x=answer(b"hi")) as site:
                site.pages = {"/a%20b/%C3%BC?q=1&%C3%A4=a+b": answer(b"hi")}
                async with Fetcher(LOCAL) as fetcher:
                    assert await fetcher.fetch(site.url + "/a%20b/ü?q=1&ä=a+b#part") == b"hi"
                lines = site.asked[0].lower()
                assert "accept-encoding: identity" in lines
                assert not {"cookie", "authorization", "referer"} & {line.split(":")[0] for line in lines.splitlines()}

        asyncio.run(work())

    def test_names_without_addresses(self) -> None:
        async def none(host: str, port: int) -> Sequence[str]:
            raise OSError("Name or service not known")

        assert refused("http://nowhere.example/", resolver=none) == "unreachable"
        assert refused("http://nowhere.example/", resolver=Resolving([])) == "unreachable"
        assert refused("http://a..example/") == "unreachable"

    def test_names_that_take_long(self) -> None:
        async def never(host: str, port: int) -> Sequence[str]:
            await asyncio.sleep(60)
            return []

        assert refused("http://slow.example/", MediaAccess(total_s=0.1), resolver=never) == "too_slow_to_fetch"


class TestData:
    def test_whole(self) -> None:
        for content in (b"", b"a", b"ab", b"abc", os.urandom(1000)):
            text = base64.b64encode(content).decode()
            access = MediaAccess(max_bytes=len(content))
            assert fetch(f"data:image/png;base64,{text}", access) == content
            assert fetch(f"DATA:;charset=x;BASE64,{text}", access) == content
            if content:
                access = MediaAccess(max_bytes=len(content) - 1)
                assert refused(f"data:image/png;base64,{text}", access) == "too_many_bytes"

    @pytest.mark.parametrize("address", ["data:", "data:,hi", "data:image/png,hi", "data:;base64", "data:;base64,a",
                                         "data:;base64,!!!!", "data:;base64,aGk", "data:;base64,äöüß"])  # fmt: skip
    def test_broken(self, address: str) -> None:
        assert refused(address) == "bad_data"

    def test_length_comes_first(self) -> None:
        address = "data:;base64," + "!" * 100_000_000
        started = time.perf_counter()
        assert refused(address, MediaAccess(max_bytes=1000)) == "too_many_bytes"
        assert time.perf_counter() - started < 0.1


class TestFiles:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        folder = tmp_path / "media"
        (folder / "inner").mkdir(parents=True)
        (folder / "a b.png").write_bytes(b"picture")
        (folder / "inner" / "c.png").write_bytes(b"inner")
        (tmp_path / "secret").write_bytes(b"secret")
        (tmp_path / "media2").mkdir()
        (tmp_path / "media2" / "x").write_bytes(b"secret")
        (folder / "out").symlink_to(tmp_path / "secret")
        (folder / "up").symlink_to(tmp_path)
        (folder / "in").symlink_to(folder / "a b.png")
        (folder / "loop").symlink_to(folder / "loop")
        os.mkfifo(folder / "pipe")
        return folder

    def test_inside(self, folder: Path) -> None:
        access = MediaAccess(folder=folder)
        for address in (
            f"file://{folder}/a%20b.png", f"file://localhost{folder}/a b.png", f"{folder}/a b.png", "a b.png", "in",
            "./inner/../a b.png", f"FILE:{folder}/inner/../a b.png",
        ):  # fmt: skip
            assert fetch(address, access) == b"picture", address
        assert fetch("inner/c.png", access) == b"inner"

    def test_outside(self, folder: Path) -> None:
        access = MediaAccess(folder=folder)
        for address in (
            "/etc/passwd", "file:///etc/passwd", f"{folder}/../secret", "../secret", "..", "out", "up/secret", "loop",
            "pipe", "inner", "", "nothing", f"{folder}2/x", f"file://{folder}/%2e%2e/secret", f"file://evil{folder}/in",
            "in\0", "file:///dev/zero", "~/x", f"file://{folder}/in%00", "..\\secret",
        ):  # fmt: skip
            assert refused(address, access) == "bad_file", address

    def test_size(self, folder: Path) -> None:
        assert refused("in", MediaAccess(folder=folder, max_bytes=6)) == "too_many_bytes"
        assert fetch("in", MediaAccess(folder=folder, max_bytes=7)) == b"picture"

    def test_none_by_default(self, folder: Path) -> None:
        for address in (f"file://{folder}/in", f"{folder}/in", "in", "//host/share"):
            assert refused(address) == "no_files"


class TestAnswers:
    def check(self, expected: str, access: MediaAccess = LOCAL, **pages: Any) -> None:
        async def work() -> None:
            async with web(**pages) as site:
                started = time.perf_counter()
                assert await code_of(site, "x", access) == expected
                assert time.perf_counter() - started < 3
                for _ in range(100):
                    if not site.open:
                        break
                    await asyncio.sleep(0.02)
                assert not site.open  # nothing is left hanging

        asyncio.run(work())

    def test_redirects(self) -> None:
        pages: dict[str, Any] = {"z?q": redirect("w"), "w": answer(b"hi")}
        self.check("", x=redirect("/y"), y=redirect("z?q"), **pages)
        self.check("too_many_redirects", x=redirect("x"))
        self.check("too_many_redirects", MediaAccess(private=True, max_redirects=0), x=redirect("y"), y=answer(b"hi"))
        self.check("unreachable", x=answer(status="302 Found"))

    @pytest.mark.parametrize("status", ["404 Not Found", "401 Unauthorized", "500 Oops", "204 No Content", "206 Part"])
    def test_other_statuses(self, status: str) -> None:
        self.check("unreachable", x=answer(b"secret", status=status))

    def test_slow_drip(self) -> None:
        self.check("too_slow_to_fetch", MediaAccess(private=True, total_s=0.5), x=drip(1000, 0.05))
        self.check("too_slow_to_fetch", MediaAccess(private=True, idle_s=0.2), x=drip(1000, 30))
        self.check("", MediaAccess(private=True, idle_s=0.5), x=drip(20, 0.01))

    def test_silence(self) -> None:
        async def silent(writer: asyncio.StreamWriter) -> None:
            await asyncio.sleep(1)

        self.check("too_slow_to_fetch", MediaAccess(private=True, idle_s=0.2), x=silent)

    def test_endless(self) -> None:
        async def endless(writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            while True:
                writer.write(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
                await writer.drain()

        async def until_closed(writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.0 200 OK\r\n\r\n")
            while True:
                writer.write(b"x" * 0x10000)
                await writer.drain()

        async def headers(writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 200 OK\r\n")
            while True:
                writer.write(b"X-Y: " + b"x" * 1000 + b"\r\n")
                await writer.drain()

        access = MediaAccess(private=True, max_bytes=1_000_000)
        self.check("too_many_bytes", access, x=endless)
        self.check("too_many_bytes", access, x=until_closed)
        self.check("unreachable", access, x=headers)

    def test_content_length(self) -> None:
        access = MediaAccess(private=True, max_bytes=10)
        self.check("", access, x=answer(b"x" * 10))
        self.check("too_many_bytes", access, x=answer(b"x" * 11))
        self.check("too_many_bytes", access, x=drip(11, 30))  # before any of it has come
        self.check("unreachable", x=answer(b"short", content_length=10))
        self.check("unreachable", x=answer(b"odd", content_length=-1))
        self.check("", x=answer(b"no length", content_length=""))

    def test_compressed(self) -> None:
        bomb = gzip.compress(b"\0" * 10_000_000)
        self.check("compressed", x=answer(bomb, content_encoding="gzip"))
        self.check("compressed", x=answer(bomb, content_encoding="identity, br"))
        self.check("unreachable", x=answer(bomb, content_length="", transfer_encoding="gzip, chunked"))
        self.check("", x=answer(b"plain", content_encoding="identity"))

    def test_not_http(self) -> None:
        self.check("unreachable", x=b"SSH-2.0-OpenSSH_9.6\r\n")
        self.check("unreachable", x=b"")

    def test_nobody_listens(self) -> None:
        assert refused("http://127.0.0.1:1/", LOCAL) == "unreachable"

    def test_one_address_of_two(self) -> None:
        async def work() -> None:
            async with web(x=answer(b"hi")) as site:
                assert await code_of(site, "x", resolver=Resolving(["127.0.0.9", "127.0.0.1"])) == ""

        asyncio.run(work())

    def test_cancelled(self) -> None:
        async def work() -> None:
            async with web(x=drip(1000, 0.05)) as site, Fetcher(LOCAL) as fetcher:
                task = asyncio.create_task(fetcher.fetch(site.url + "/x"))
                while not site.open:
                    await asyncio.sleep(0.01)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                for _ in range(100):
                    await asyncio.sleep(0.02)
                    if not site.open:
                        return
                raise AssertionError("the connection stayed open")

        asyncio.run(work())


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
class TestTLS:
    def test_name_is_asked_for_and_checked(self, tmp_path: Path) -> None:
        key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
             "-subj", "/CN=media.test", "-addext", "subjectAltName=DNS:media.test", "-keyout", key,
             "-out", certificate],
            check=True, capture_output=True,
        )  # fmt: skip
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(certificate, key)
        trust = ssl.create_default_context(cafile=str(certificate))

        async def work() -> None:
            async with web(tls=tls, x=answer(b"hi")) as site:
                options: dict[str, Any] = {"resolver": Resolving(["127.0.0.1"])}
                address = f"https://media.test:{site.port}/x"
                async with Fetcher(LOCAL, tls=trust, **options) as fetcher:
                    assert await fetcher.fetch(address) == b"hi"
                    assert site.names == ["media.test"]
                    with pytest.raises(MediaError) as caught:
                        await fetcher.fetch(address.replace("media", "other"))
                    assert caught.value.code == "unreachable"
                async with Fetcher(LOCAL, **options) as fetcher:  # a certificate that nobody has signed
                    with pytest.raises(MediaError) as caught:
                        await fetcher.fetch(address)
                    assert caught.value.code == "unreachable"
                assert len(site.asked) == 1

        asyncio.run(work())
