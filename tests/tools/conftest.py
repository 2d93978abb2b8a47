# SPDX-License-Identifier: Apache-2.0
"""A xenstore of ours on a unix socket, in a thread, for outside tools to talk to."""

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from xvd.machine.emulated.xenstore import XenstoreStore
from xvd.machine.xs.server import XenstoreServer


class ServedXenstore:
    """The running server; `environment` sends Debian's tools to it."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "socket"
        # The first is what libxenstore 4.17 looks at, the second what it prefers if it is set.
        self.environment = os.environ | {"XENSTORED_RUNDIR": str(directory)}
        self.environment.pop("XENSTORED_PATH", None)
        self.store = XenstoreStore()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._server = XenstoreServer(self.store)
        self._run(self._server.listen(self.path))

    def _run(self, coroutine) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    def wait_for_watches(self, number: int) -> None:
        """Until so many are set."""
        deadline = time.monotonic() + 10

        async def look() -> None:
            while self.store.counts.watches < number:
                assert time.monotonic() < deadline, f"{self.store.counts} after ten seconds"
                await asyncio.sleep(0)

        self._run(look())

    def close(self) -> None:
        self._run(self._server.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture
def xenstore(tmp_path: Path) -> Iterator[ServedXenstore]:
    served = ServedXenstore(tmp_path)
    yield served
    served.close()
