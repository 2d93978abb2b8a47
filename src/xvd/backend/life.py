# SPDX-License-Identifier: Apache-2.0
"""The life of a disk's storage while its guest uses the disk: paused, resumed, and exchanged.

The guest sees a delay. Whatever fails leaves the disk with the storage that it had, and paused or
not as before. What was decided outlives the daemon (`DiskState.decide`).
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace

from xvd.backend.disk import ServedDisk
from xvd.backend.opened import Opened
from xvd.backend.state import DiskState
from xvd.backend.tracking import Tracking
from xvd.blkif.abi import InfoFlag
from xvd.blkif.features import BackendFeatures
from xvd.engines.interface import Engine
from xvd.errors import ConfigError, PeerClosed, XvdError, describe
from xvd.types import RING_SECTOR_SIZE
from xvd.xenbus.log import DeviceLog
from xvd.xenbus.runner import Runtime, leave_alone

_KEPT = ("flush", "discard", "discard_secure")


def unmet(promised: BackendFeatures, has: BackendFeatures) -> list[str]:
    """Return what a guest was promised of its disk and other storage has not, in words."""
    found = []
    if has.sectors < promised.sectors:
        sizes = (has.sectors * RING_SECTOR_SIZE, promised.sectors * RING_SECTOR_SIZE)
        found.append("it has {} bytes and the disk {}".format(*sizes))
    if has.sector_size != promised.sector_size:
        sizes = (has.sector_size, promised.sector_size)
        found.append("its blocks are of {} bytes and the disk's of {}".format(*sizes))
    if has.info & InfoFlag.READONLY and not promised.info & InfoFlag.READONLY:
        found.append("it is read-only and the disk is not")
    lacking = [name for name in _KEPT if getattr(promised, name) and not getattr(has, name)]
    if lacking:
        found.append(f"it cannot do what the guest was told of: {', '.join(lacking)}")
    return found


class StorageLife:
    """What may be done to one disk's storage, one thing at a time. For the event loop's thread.

    opened: opens other storage for the disk. offers: what such storage would let the disk offer.
    swapped: called with the URI of the storage that it has now. tracking: of what changes on it.
    is_held: whether its storage is away, and what failed is tried again now and then.
    """

    def __init__(
        self,
        disk: ServedDisk,
        kept: DiskState,
        log: DeviceLog,
        runtime: Runtime,
        *,
        opened: Callable[[str], Awaitable[Engine]],
        offers: Callable[[Engine], BackendFeatures],
        swapped: Callable[[str], None],
        tracking: Tracking,
        is_held: Callable[[], bool],
    ) -> None:
        self._disk = disk
        self._kept = kept
        self._log = log
        self._runtime = runtime
        self.open = opened
        self.offers = offers
        self.turn = asyncio.Lock()
        """Whoever changes the storage has it."""
        self.held_by = ""
        """Why the storage may not be exchanged now, in words; mostly nothing."""
        self._swapped = swapped
        self._tracking = tracking
        self._is_held = is_held

    @property
    def swapped_to(self) -> str:
        """The URI of its storage, where that is not the toolstack's."""
        return self._kept.decision().image

    async def pause(self, timeout_s: float) -> None:
        """Take no more requests; return when nothing is in flight, and what was written can be read
        by whoever reads the image.

        Raises `ConfigError` if that is not so after a while, and then the disk goes on.
        """
        async with self.turn:
            was, connection = self._kept.decision(), self._disk.connection
            held = self._is_held() or (connection is not None and connection.held)
            self._decide(paused=True)
            try:
                await self._pause(timeout_s)
            except BaseException:
                self._kept.decide(was)
                raise
            self._log.info("paused", event="paused")
            if not held:
                await self._write_out(timeout_s)

    async def _write_out(self, timeout_s: float) -> None:
        """Flush: an image format keeps in memory what a reader of its file would miss."""
        engine = self._disk.engine
        if engine is None or engine.info.read_only:
            return
        try:
            async with asyncio.timeout(timeout_s):
                await self._runtime.call(engine.flush)
        except (OSError, XvdError) as error:  # TimeoutError too
            why = describe(error)
            self._log.warning(
                "paused, and its storage could not be flushed: %s", why, event="paused"
            )

    async def resume(self) -> None:
        """Go on, if it is paused."""
        async with self.turn:
            self._decide(paused=False)
            self._resume()
            self._log.info("resumed", event="resumed")

    async def swap(self, image: str, timeout_s: float, *, abandon: bool = False) -> None:
        """Let other storage take the place of the disk's, whole blocks for whole blocks.

        abandon: the old one hangs, and is not waited for: what it has is executed by the new one,
        and no late answer of it reaches the guest or its pages. Raises `ConfigError` where the new
        one does not fit, or the old one does not come to rest in time, or cannot be abandoned, and
        what opening raises; then nothing is changed.
        """
        async with self.turn:
            if self.held_by:
                raise ConfigError(f"{self._log.disk}: {self.held_by}")
            # A caller that goes away, as one who is interrupted does, leaves no half of it.
            swap = self._abandon(image, timeout_s) if abandon else self._swap(image, timeout_s)
            await asyncio.shield(asyncio.ensure_future(swap))

    async def _abandon(self, image: str, timeout_s: float) -> None:
        disk, before, was = self._disk, self.storage, self._disk.paused
        engine = await self.open(image)
        gone: asyncio.Future[None] | None = None
        try:
            self.check_fits(image, unmet(before.features, self.offers(engine)))
            disk.paused = True
            if disk.connection is not None:
                disk.connection.halt()
                try:
                    await disk.connection.check_leaves(timeout_s)
                except ConfigError as error:
                    raise ConfigError(f"{self._log.disk}: its storage: {error}") from None
            gone = await self._exchange(engine, image, leaving=True)
            self._tracking.forget()
        except BaseException:
            await self._runtime.call(engine.close)
            raise
        finally:
            if not was:
                self._resume()
        self._log.warning(
            "its storage is %s now; the old one was left with what it had", image, event="swapped"
        )
        leave_alone(self._close_left(gone, before.close))
        await self._disk.follow_size()

    async def _close_left(
        self, gone: "asyncio.Future[None] | None", close: Callable[[], Awaitable[None]]
    ) -> None:
        if gone is not None:
            await gone
        await self.close_old(close)
        self._log.info(
            "the storage that it had left has ended what it had, and is closed", event="left-closed"
        )

    async def _swap(self, image: str, timeout_s: float) -> None:
        before = self.storage
        engine = await self.open(image)
        try:
            self.check_fits(image, unmet(before.features, self.offers(engine)))
            async with self.at_rest(timeout_s):
                await self.exchange(engine, image)
                self._tracking.forget()
        except BaseException:
            await self._runtime.call(engine.close)
            raise
        self._log.info("its storage is %s now", image, event="swapped")
        await self.close_old(before.close)
        await self._disk.follow_size()

    # ---- What an exchange is made of, for whoever has the turn ----

    @property
    def storage(self) -> Opened:
        """The storage that it has; `ConfigError` if there is none."""
        if self._disk.opened is None:
            raise ConfigError(f"{self._log.disk}: it has no storage; detach it")
        return self._disk.opened

    def check_fits(self, image: str, lacking: list[str]) -> None:
        """Raise `ConfigError` with what an image lacks, if that is anything."""
        if lacking:
            raise ConfigError(f"{self._log.disk}: {image} does not fit: {'; '.join(lacking)}")

    @contextlib.asynccontextmanager
    async def at_rest(self, timeout_s: float) -> AsyncIterator[None]:
        """Let nothing be in flight meanwhile. Raises `ConfigError` if that does not come to be."""
        paused = self._disk.paused
        try:
            await self._pause(timeout_s)
            yield
        finally:
            if not paused:
                self._resume()

    async def exchange(self, engine: Engine, image: str = "") -> None:
        """Go on with another engine, at rest. image: what it is, if that is other storage and not
        only another way to the same."""
        # A frontend that has connected meanwhile begins paused, and has not come to rest yet.
        while (connection := self._disk.connection) is not None and not connection.rests:
            with contextlib.suppress(PeerClosed):
                await connection.pause()
        await self._exchange(engine, image)

    async def _exchange(
        self, engine: Engine, image: str, *, leaving: bool = False
    ) -> "asyncio.Future[None] | None":
        """See `exchange`. leaving: see `Connection.leave`; what that returns is returned."""
        gone: asyncio.Future[None] | None = None
        before, connection = self.storage, self._disk.connection
        with contextlib.ExitStack() as undo:
            channels = [] if connection is None else connection.open_channels(engine)
            for channel in channels:
                undo.callback(channel.close)
            # A successor opens what is noted here: before the first request can reach it.
            if image:
                self._note(image, engine, undo)
            undo.pop_all()
        if connection is not None:
            if leaving:
                gone = await connection.leave(engine, channels)
            else:
                await connection.exchange(engine, channels)
        if image and self._kept.remembered():
            self._kept.remember(engine.identity)
        self._disk.has_opened(engine, before.features)
        if image:
            self._swapped(image)
        return gone

    async def close_old(self, close: Callable[[], Awaitable[None]]) -> None:
        """Close storage that the disk is to have no more. It may fail, and take its time."""
        try:
            await close()
        except (OSError, XvdError) as error:
            self._log.warning(
                "its storage could not be closed: %s", describe(error), event="close-failed"
            )

    def _note(self, image: str, engine: Engine, undo: contextlib.ExitStack) -> None:
        was, known = self._kept.decision(), self._kept.remembered()
        if known:  # by a guest that is connected, or was when a predecessor ended
            # Both, as long as it may be either that a successor opens.
            undo.callback(self._kept.remember, *known)
            self._kept.remember(*known, engine.identity)
        undo.callback(self._kept.decide, was)
        self._kept.decide(replace(was, image=image))

    async def _pause(self, timeout_s: float) -> None:
        disk, was = self._disk, self._disk.paused
        disk.paused = True
        if disk.connection is None:
            return
        try:
            async with asyncio.timeout(timeout_s):
                await disk.connection.pause()
        except TimeoutError:
            left = disk.connection.counters().in_flight
            if not was:
                self._resume()
            raise ConfigError(
                f"{self._log.disk}: {left} requests are still with the storage after "
                f"{timeout_s:g} s; the disk goes on"
            ) from None
        except PeerClosed:
            return  # the guest has left the disk meanwhile: nothing is in flight

    def _resume(self) -> None:
        self._disk.paused = False
        if self._disk.connection is not None:
            self._disk.connection.resume()

    def _decide(self, *, paused: bool) -> None:
        self._kept.decide(replace(self._kept.decision(), paused=paused))
