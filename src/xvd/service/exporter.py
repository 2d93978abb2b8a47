# SPDX-License-Identifier: Apache-2.0
"""The exporter: at each scrape the daemons are asked; no figure of theirs is kept.

Scrapes come by HTTP, over TCP or a unix socket, each in a thread of its own.
"""

import contextlib
import logging
import os
import selectors
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app, write_to_textfile
from prometheus_client.metrics_core import Metric as Family

from xvd.errors import ConfigError, describe
from xvd.service.metrics import TABLES, Scrape, disks_of, families

logger = logging.getLogger(__name__)

CONNECTIONS_MAX: Final = 16
"""Served at the same time; further ones are closed."""
PATIENCE_S: Final = 10.0
"""For a request to come and its answer to go; Prometheus's own patience by default."""
TEXTFILE_SUFFIX: Final = ".prom"
"""Of files that node_exporter reads; it passes over others."""


class DaemonCollector:
    """What prometheus_client asks for metrics; for any thread.

    look: does one scrape, in bounded time; its errors are added to those of earlier scrapes.
    """

    def __init__(self, look: Callable[[], Scrape]) -> None:
        self._look = look
        self._errors: Counter[str] = Counter()
        self._lock = threading.Lock()

    def describe(self) -> Iterator[Family]:
        """Yield every metric without samples."""
        for metrics, common in TABLES:
            for metric in metrics:
                yield metric.family(common)

    def collect(self) -> Iterator[Family]:
        """Scrape, and yield every metric."""
        scrape = self._look()
        disks, unreadable = disks_of(scrape.daemons)
        with self._lock:
            self._errors.update(scrape.errors)
            self._errors["figures"] += unreadable
            so_far = dict(self._errors)
        yield from families(replace(scrape, errors=so_far), disks)


def registry_of(look: Callable[[], Scrape]) -> CollectorRegistry:
    """Return the registry of one exporter: nothing but the metrics of `TABLES`."""
    registry = CollectorRegistry()
    registry.register(DaemonCollector(look))
    return registry


def write_textfile(registry: CollectorRegistry, path: Path) -> None:
    """Scrape once and replace `path` in one step; raises OSError, and then it is as it was."""
    write_to_textfile(str(path), registry)


# ---- HTTP --------------------------------------------------------------------------------------


class _Handler(WSGIRequestHandler):
    timeout = PATIENCE_S

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of each scrape."""


class _Server(ThreadingMixIn, WSGIServer):
    """An HTTP server on a socket that listens already."""

    daemon_threads = True
    timeout = 0
    """For which `handle_request` waits: it is called when somebody is there."""

    def __init__(self, listener: socket.socket) -> None:
        super().__init__(("", 0), _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.server_name, self.server_port = "xvd", 0
        self.setup_environ()
        self._places = threading.BoundedSemaphore(CONNECTIONS_MAX)

    def run(self, bell: int) -> None:
        """Answer scrapes until the eventfd `bell` is rung; `serve_forever` would look twice a
        second whether it is to end."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.socket, selectors.EVENT_READ)
            selector.register(bell, selectors.EVENT_READ)
            while all(key.fd != bell for key, _ in selector.select()):
                self.handle_request()

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection; a unix socket's client has no address, which the handler needs."""
        connection, _ = self.socket.accept()
        return connection, ("local", 0)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._places.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Note a client that went away or said nothing, instead of printing a traceback."""
        logger.debug("a scrape was cut short: %s %s", request, client_address, exc_info=True)


@contextlib.contextmanager
def serving(registry: CollectorRegistry, listener: socket.socket) -> Iterator[None]:
    """Answer scrapes on a socket that listens, until the end; the socket is closed then.

    Scrapes that are under way at the end are not waited for.
    """
    server = _Server(listener)
    server.set_app(make_wsgi_app(registry))
    bell = os.eventfd(0, os.EFD_CLOEXEC)
    thread = threading.Thread(target=server.run, args=(bell,), name="exporter", daemon=True)
    thread.start()
    try:
        yield
    finally:
        os.eventfd_write(bell, 1)
        thread.join()
        os.close(bell)
        listener.close()


def listen_tcp(host: str, port: int) -> socket.socket:
    """Listen at an address; port 0 is any free one. Raises `ConfigError` if that cannot be."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind | socket.SOCK_CLOEXEC)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(CONNECTIONS_MAX)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ConfigError(
            f"{host}:{port}: cannot listen there ({describe(error)}); choose another address"
        ) from None
    return listener
