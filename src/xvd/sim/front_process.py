# SPDX-License-Identifier: Apache-2.0
"""A guest's process of the simulated machine: the shipped `Disk`, opened whenever there is one."""

import asyncio

from xvd.blkif.handshake import FrontendState
from xvd.errors import XvdError
from xvd.frontend.disk import Disk
from xvd.frontend.settings import Settings
from xvd.sim.process import Process
from xvd.sim.tool_process import PATH

AGAIN_S = 0.5
"""How long it waits after a disk that cannot be opened."""


class FrontProcess(Process):
    """Uses the guest's disk, until it is asked to end. disk: while it is open."""

    over = False
    disk: Disk | None = None
    _asked: asyncio.Event

    def begin(self, settings: Settings) -> None:
        """Start it."""
        self._asked = asyncio.Event()
        self.spawn(self._main(settings))

    async def _main(self, settings: Settings) -> None:
        try:
            store = await self.machine.xenstore()
            asked = asyncio.ensure_future(self._asked.wait())
            while not asked.done():
                try:
                    opening = Disk.open(self.machine, store, PATH, settings=settings, runtime=self)
                    disk = await opening
                except (OSError, XvdError):
                    await asyncio.wait((asked,), timeout=AGAIN_S)
                    continue
                self.disk = disk
                gone = asyncio.ensure_future(disk.gone.wait())
                await asyncio.wait((gone, asked), return_when=asyncio.FIRST_COMPLETED)
                gone.cancel()
                self.disk = None
                self.connections += disk.connections
                await disk.close()
            await store.close()
        finally:
            self.over = True

    @property
    def connected(self) -> bool:
        """Whether its disk can be used now."""
        return self.disk is not None and self.disk.device.state is FrontendState.CONNECTED

    def ask_to_end(self) -> None:
        """Ask it to end, as SIGTERM does."""
        self._asked.set()

    def die(self) -> None:
        """Die as by SIGKILL."""
        self.kill()
