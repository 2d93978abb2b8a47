# SPDX-License-Identifier: Apache-2.0
"""TLS on TCP: clients that come by it, and those that would abuse its beginning."""

import asyncio
import contextlib
import shutil
import ssl
import struct
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from tls_files import make_credentials, make_dated

from xvd.embed import EmulatedHost
from xvd.errors import ConfigError
from xvd.export.nbd import NbdServer
from xvd.export.tls import server_context

SIZE = 1 << 20
GREETING = 18
STARTTLS = b"IHAVEOPT" + struct.pack(">II", 5, 0)
EXPORT_NAME = b"IHAVEOPT" + struct.pack(">II", 1, 0)
ACK = struct.pack(">QIII", 0x3E889045565A9, 5, 1, 0)
FLAGS = struct.pack(">I", 3)


@pytest.fixture(scope="session")
def credentials(
    tmp_path_factory: pytest.TempPathFactory, requires_tool: Callable[[str], str]
) -> Path:
    return make_credentials(requires_tool("openssl"), tmp_path_factory.mktemp("tls"))


@contextlib.asynccontextmanager
async def exported(credentials: Path, **limits: float) -> AsyncIterator[tuple[NbdServer, int]]:
    async with EmulatedHost.serving(f"memory:{SIZE}") as disk:
        async with NbdServer(disk, **limits) as server:  # type: ignore[arg-type]
            tls = server_context(credentials, verify_peer=False)
            await server.listen_tcp(port=0, tls=tls)
            yield server, server.ports[0]


async def greeted(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    await reader.readexactly(GREETING)
    writer.write(FLAGS)
    return reader, writer


def context_of(credentials: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=credentials / "ca-cert.pem")


def run(work: Callable[[], object]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(30):
            await work()  # type: ignore[misc]

    asyncio.run(limited())


async def ended(reader: asyncio.StreamReader) -> bytes:
    """What came before the server closed."""
    with contextlib.suppress(ConnectionError):
        return await reader.read()
    return b""


def test_a_disk_is_written_and_read_within_tls(credentials: Path) -> None:
    async def work() -> None:
        async with exported(credentials) as (_, port):
            reader, writer = await greeted(port)
            writer.write(STARTTLS)
            assert await reader.readexactly(len(ACK)) == ACK
            await writer.start_tls(context_of(credentials), server_hostname="localhost")
            writer.write(EXPORT_NAME)
            size, _ = struct.unpack(">QH", await reader.readexactly(10))
            data = bytes(range(256)) * 2048
            writer.write(struct.pack(">IHHQQI", 0x25609513, 0, 1, 1, 0, len(data)) + data)
            written = await reader.readexactly(16)
            writer.write(struct.pack(">IHHQQI", 0x25609513, 0, 0, 2, 0, len(data)))
            found = await reader.readexactly(16 + len(data))

            assert size == SIZE
            assert written == struct.pack(">IIQ", 0x67446698, 0, 1)
            assert found == struct.pack(">IIQ", 0x67446698, 0, 2) + data
            writer.close()

    run(work)


def test_what_was_said_before_tls_does_not_count_within_it(credentials: Path) -> None:
    """Whoever sits between the two might slip an option in, in plain text."""

    async def work() -> None:
        async with exported(credentials) as (server, port):
            reader, writer = await greeted(port)

            writer.write(STARTTLS + EXPORT_NAME)

            assert await ended(reader) == b""
            assert server.counters()["malformed"] == 1
            writer.close()

    run(work)


def test_a_client_that_speaks_no_tls_is_cut_off(credentials: Path) -> None:
    async def work() -> None:
        async with exported(credentials) as (server, port):
            reader, writer = await greeted(port)
            writer.write(STARTTLS)
            await reader.readexactly(len(ACK))

            writer.write(EXPORT_NAME * 8)

            await ended(reader)
            writer.close()
            while server.counters()["connected"]:  # noqa: ASYNC110
                await asyncio.sleep(0)
            assert server.counters()["handshakes"] == 0

    run(work)


def test_a_client_that_does_not_go_on_keeps_no_place(credentials: Path) -> None:
    async def work() -> None:
        async with exported(credentials, patience_s=0.05) as (server, port):
            reader, writer = await greeted(port)
            writer.write(STARTTLS)
            await reader.readexactly(len(ACK))

            assert await ended(reader) == b""
            assert server.counters()["connected"] == 0
            writer.close()

    run(work)


def test_a_server_that_closes_leaves_nobody_behind(credentials: Path) -> None:
    async def work() -> None:
        async with exported(credentials) as (server, port):
            clients = []
            for _ in range(3):
                reader, writer = await greeted(port)
                writer.write(STARTTLS)
                await reader.readexactly(len(ACK))
                clients.append((reader, writer))
            _, writer = clients[0]
            await writer.start_tls(context_of(credentials), server_hostname="localhost")

            await server.close(timeout_s=0.1)

            assert server.counters()["connected"] == 0
            for reader, writer in clients:
                await ended(reader)
                writer.close()

    run(work)


def test_a_client_that_trusts_nobody_leaves(credentials: Path) -> None:
    async def work() -> None:
        async with exported(credentials) as (server, port):
            reader, writer = await greeted(port)
            writer.write(STARTTLS)
            await reader.readexactly(len(ACK))

            with pytest.raises(ssl.SSLCertVerificationError):
                await writer.start_tls(ssl.create_default_context(), server_hostname="localhost")

            writer.close()
            while server.counters()["connected"]:  # noqa: ASYNC110
                await asyncio.sleep(0)

    run(work)


@pytest.mark.parametrize(
    ("name", "years", "said"),
    [
        ("server", (2020, 2021), r"server-cert\.pem: it has expired, so that no client would"
         " believe it; make a new one"),
        ("server", (2999, 3000), r"server-cert\.pem: it is not valid yet, so that no client would"),
        ("ca", (2020, 2021), r"ca-cert\.pem: it has expired \(Jan  1 .* 2021 GMT\), so that no"
         " client would be let in; make a new one"),
    ],
)  # fmt: skip
def test_certificates_of_another_time_are_refused(
    credentials: Path,
    tmp_path: Path,
    requires_tool: Callable[[str], str],
    name: str,
    years: tuple[int, int],
    said: str,
) -> None:
    copy = tmp_path / "tls"
    shutil.copytree(credentials, copy)
    make_dated(requires_tool("openssl"), copy, name, *years)

    with pytest.raises(ConfigError, match=said):
        server_context(copy, verify_peer=True)


def test_an_expired_authority_is_nothing_where_no_client_is_asked(
    credentials: Path, tmp_path: Path, requires_tool: Callable[[str], str]
) -> None:
    copy = tmp_path / "tls"
    shutil.copytree(credentials, copy)
    make_dated(requires_tool("openssl"), copy, "ca", 2020, 2021)

    server_context(copy, verify_peer=False)


def test_the_least_is_tls_1_2(credentials: Path) -> None:
    context = server_context(credentials, verify_peer=True)

    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert context.verify_mode == ssl.CERT_REQUIRED
