# SPDX-License-Identifier: Apache-2.0
"""TLS for NBD on TCP (proto.md, "TLS support"): the server's certificate, and who speaks it.

A transmission reads and writes a socket without Python (transmission.pyx). So TLS is spoken by a
relay in the event loop, between the client and a socket pair whose other end is served as a client.
"""

import asyncio
import contextlib
import socket
import ssl
import time
from pathlib import Path
from typing import Final

from xvd.errors import ConfigError, describe

CA, CERTIFICATE, KEY = "ca-cert.pem", "server-cert.pem", "server-key.pem"
"""Files in the directory of credentials, under the names that nbdkit and QEMU look for."""
_PIECE: Final = 256 * 1024
"""Bytes that are passed on at a time."""


def server_context(directory: Path, *, verify_peer: bool) -> ssl.SSLContext:
    """Make what `NbdServer.listen_tcp` demands of clients, from the files in `directory`.

    verify_peer: a client has to show a certificate that `CA` has signed; without it anybody may
    come. TLS 1.2 is the least. Raises `ConfigError` for a file that is missing or no good, and for
    a certificate whose time has passed or is to come: no client would believe it.
    """
    wanted = (CERTIFICATE, KEY, *([CA] if verify_peer else []))
    for name in wanted:
        if not (directory / name).is_file():
            raise ConfigError(f"{directory / name}: no such file; TLS needs {', '.join(wanted)}")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # An answer to the question for a passphrase, which would be put to the terminal.
        context.load_cert_chain(directory / CERTIFICATE, directory / KEY, password=lambda: "")
        if verify_peer:
            context.load_verify_locations(directory / CA)
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"{directory}: no credentials for TLS: {describe(error)}") from None
    for authority in context.get_ca_certs():
        if ssl.cert_time_to_seconds(str(authority["notAfter"])) < time.time():
            raise ConfigError(
                f"{directory / CA}: it has expired ({authority['notAfter']}), so that no client "
                "would be let in; make a new one, and sign the clients' certificates by that"
            )
    _check_time(context, directory / CERTIFICATE)
    return context


_NOT_YET: Final = 9
_EXPIRED: Final = 10
"""X509_V_ERR_CERT_NOT_YET_VALID and X509_V_ERR_CERT_HAS_EXPIRED of OpenSSL's x509_vfy.h."""
_TIMES: Final = {_NOT_YET: "is not valid yet", _EXPIRED: "has expired"}


def _check_time(context: ssl.SSLContext, certificate: Path) -> None:
    """Have a client of our own look at the certificate, within this process.

    It believes the certificate itself, so whatever it finds is the certificate's own fault.
    """
    believing = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    believing.check_hostname = False
    believing.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    believing.load_verify_locations(certificate)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = believing.wrap_bio(to_client, to_server)
    server = context.wrap_bio(to_server, to_client, server_side=True)
    try:
        for side in (client, server, client):
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
    except ssl.SSLCertVerificationError as error:
        if why := _TIMES.get(error.verify_code):
            raise ConfigError(
                f"{certificate}: it {why}, so that no client would believe it; make a new one, or "
                "set this machine's clock"
            ) from None
    except ssl.SSLError:
        return  # what else a client may say of it is the client's affair


async def relay(
    client: socket.socket, plain: socket.socket, context: ssl.SSLContext, patience_s: float
) -> None:
    """Speak TLS with a client as its server, and pass on what is spoken within it.

    Both sockets are ours. Ends when either side does; what the server has sent before is delivered.
    A client that does not finish the handshake within `patience_s` seconds is cut off, and the
    plain side sees its end.
    """
    loop = asyncio.get_running_loop()
    within, into = await asyncio.open_connection(sock=plain, limit=_PIECE)
    secret = asyncio.StreamReader(limit=_PIECE)
    try:
        transport, protocol = await loop.connect_accepted_socket(
            lambda: asyncio.StreamReaderProtocol(secret),
            client, ssl=context, ssl_handshake_timeout=patience_s, ssl_shutdown_timeout=patience_s,
        )  # fmt: skip
    except BaseException as error:
        into.close()
        client.close()
        if isinstance(error, OSError):  # it speaks no TLS, is not believed, or has gone
            return
        raise
    out = asyncio.StreamWriter(transport, protocol, secret, loop)
    asking = asyncio.ensure_future(_pass_on(secret, into, ends=True))
    try:
        await _pass_on(within, out, ends=False)
    finally:
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        into.close()
        out.close()
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await out.wait_closed()


async def _pass_on(source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, ends: bool) -> None:
    """Pass on until the source ends; ends: tell the sink so."""
    with contextlib.suppress(OSError):
        while data := await source.read(_PIECE):
            sink.write(data)
            await sink.drain()
    if ends:
        with contextlib.suppress(OSError):
            sink.write_eof()
