# SPDX-License-Identifier: Apache-2.0
"""Copies of a disk's storage that are made while its guest uses the disk: mirrors and backups.

Both are one thing: another storage is made the same as the disk's (engines/layers/mirror.py), which
takes as long as it takes, while the guest goes on. A mirror stays the same until the disk moves to
it (`pivot`). A backup ends when it is the same, while nothing is in flight: that is the one point
of the guest's requests whose state it has.

A copy does not outlive the daemon. A successor has the disk's own storage.
"""

import asyncio
import contextlib
import os
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from xvd.backend.disk import ServedDisk
from xvd.backend.life import StorageLife, unmet
from xvd.backend.tracking import Tracking
from xvd.engines.interface import Engine
from xvd.engines.live.images import create_image
from xvd.engines.live.mirror import Mirror
from xvd.engines.live.tracked import ChangeMap
from xvd.errors import ConfigError, XvdError, describe
from xvd.xenbus.log import DeviceLog
from xvd.xenbus.runner import Runtime, leave_alone

STEP: Final = 8 << 20
"""Bytes from one look at what goes on to the next."""
NEAR: Final = 4 << 20
"""So much may be left when a mirror is ready: it is copied while the guest waits."""
IDLE_S: Final = 0.05
"""Until the next look where there is nothing to be copied."""
PATIENCE_S: Final = 60.0
"""For storage to come to rest, and for the last bytes to be copied."""


class Kind(StrEnum):
    """What a copy is for."""

    MIRROR = "mirror"
    BACKUP = "backup"


class Phase(StrEnum):
    """How far a copy is."""

    COPYING = "copying"
    READY = "ready"
    DONE = "done"
    CANCELLED = "cancelled"
    FAILED = "failed"


_OVER: Final = frozenset((Phase.DONE, Phase.CANCELLED, Phase.FAILED))


@dataclass(slots=True)
class Job:
    """One copy. image: the target's URI. tracked: of a backup, the name of the map of what changes
    after it. incremental: whether it has only what had changed. made: the path of an image that was
    made for it."""

    kind: Kind
    image: str
    mirror: Mirror
    size: int
    tracked: str = ""
    incremental: bool = False
    made: str = ""
    phase: Phase = Phase.COPYING
    why: str = ""
    copied: int = 0
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    def figures(self) -> dict[str, Any]:
        """Return what is to be told of it; bytes."""
        return {
            "kind": self.kind,
            "storage": self.image,
            "phase": self.phase,
            "why": self.why,
            "incremental": self.incremental,
            "copied": self.copied,
            "left": 0 if self.phase in _OVER else self.mirror.left,
            "size": self.size,
        }


def _lacks(target: Engine, size: int) -> list[str]:
    """Return what keeps storage from holding a disk's content, in words."""
    found, lacking = target.info, []
    if found.size < size:
        lacking.append(f"it has {found.size} bytes and the disk {size}")
    if found.read_only:
        lacking.append("it is read-only")
    if size % found.logical_block_size:
        lacking.append(f"its blocks are of {found.logical_block_size} bytes")
    return lacking


def _remove(made: str) -> None:
    if made:
        with contextlib.suppress(OSError):
            os.unlink(made)


class Copies:
    """The copies of one disk, one at a time. For the event loop's thread."""

    def __init__(
        self,
        life: StorageLife,
        disk: ServedDisk,
        tracking: Tracking,
        log: DeviceLog,
        runtime: Runtime,
    ) -> None:
        self.job: Job | None = None
        """The copy that is made, or was made last."""
        self._life = life
        self._disk = disk
        self._tracking = tracking
        self._log = log
        self._runtime = runtime
        self._lock = asyncio.Lock()

    @property
    def _active(self) -> Job | None:
        return None if self.job is None or self.job.phase in _OVER else self.job

    # ---- What may be asked for ----

    async def mirror(self, image: str) -> dict[str, Any]:
        """Begin to make other storage the same as the disk's; it is created where there is none.

        Raises `ConfigError` where it does not fit, and what opening it raises.
        """
        async with self._lock:
            self._check_free()
            before = self._life.storage
            target, made = await self._open(image, before.engine.info.size)
            try:
                size = before.engine.info.size
                lacking = unmet(before.features, self._life.offers(target))
                self._life.check_fits(image, lacking or _lacks(target, size))
                job = Job(Kind.MIRROR, image, Mirror(before.engine, target), size, made=made)
                await self._begin(job)
            except BaseException:
                await self._close(target, made)
                raise
            return job.figures()

    async def backup(self, image: str, name: str = "") -> dict[str, Any]:
        """Begin to write the disk's content to other storage, and only what has changed since the
        last backup of this name, if there was one; `figures` tells when it is whole.

        Raises as `mirror` does.
        """
        async with self._lock:
            self._check_free()
            engine = self._life.storage.engine
            size = engine.info.size
            last = self._tracking.last(name, size) if name else None
            changed = None if last is None else last.changed
            target, made = await self._open(image, size, "" if last is None else last.image)
            try:
                self._life.check_fits(image, _lacks(target, size))
                self._check_still(engine, size)
                mirror = Mirror(engine, target, changed)
                job = Job(Kind.BACKUP, image, mirror, size, name, changed is not None, made)
                await self._begin(job, changed)
            except BaseException:
                await self._close(target, made)
                raise
            return job.figures()

    async def pivot(self, timeout_s: float = PATIENCE_S) -> None:
        """Let the disk go on with the storage that is the same by now. Raises `ConfigError` if it
        is not, or the disk does not come to rest; then the mirror goes on."""
        async with self._lock:
            job = self._active
            if job is None or job.kind is not Kind.MIRROR:
                raise ConfigError(f"{self._log.disk}: it has no mirror; see xvd mirror")
            if job.phase is not Phase.READY:
                left = job.mirror.left
                raise ConfigError(f"{self._log.disk}: {left} bytes are not copied yet; wait")
            # A caller that goes away leaves no half of it.
            await asyncio.shield(asyncio.ensure_future(self._pivot(job, timeout_s)))

    async def cancel(self) -> None:
        """Give up the copy that is made; the disk keeps its storage. Raises `ConfigError` if none
        is, or the disk does not come to rest; then the copy goes on."""
        async with self._lock:
            job = self._active
            if job is None:
                raise ConfigError(f"{self._log.disk}: no copy of it is being made")
            await self._halt(job)
            if job.phase not in _OVER:
                await asyncio.shield(asyncio.ensure_future(self._give_up(job)))

    async def forget(self, name: str) -> None:
        """Note no more what has changed since a backup of this name. Raises `ConfigError`."""
        async with self._lock, self._life.turn:
            self._check_free()
            async with self._life.at_rest(PATIENCE_S):
                before = self._life.storage.engine
                await self._life.exchange(self._tracking.without(name, before))

    async def end(self) -> None:
        """Make no more copies: the disk is about to be left. What is open is closed with it."""
        job = self.job
        if job is not None:
            await asyncio.gather(self._halt(job), return_exceptions=True)
            if job.phase not in _OVER:
                job.phase, job.why = Phase.FAILED, "the disk was left"

    def figures(self) -> dict[str, Any] | None:
        """Tell of the copy that is made, or was made last."""
        return None if self.job is None else self.job.figures()

    # ---- The beginning ----

    def _check_free(self) -> None:
        if self._life.held_by:
            raise ConfigError(f"{self._log.disk}: {self._life.held_by}")

    async def _open(self, image: str, size: int, backing: str = "") -> tuple[Engine, str]:
        """Open a target. Its path too, if it was made for that."""
        made = await self._runtime.call(create_image, image, size, backing)
        try:
            return await self._life.open(image), made
        except BaseException:
            _remove(made)
            raise

    def _check_still(self, engine: Engine, size: int) -> None:
        """Raise `ConfigError` where the disk has not this storage any more, or not of this size."""
        if self._life.storage.engine is not engine or engine.info.size != size:
            raise ConfigError(f"{self._log.disk}: its storage was changed just now; again")

    async def _begin(self, job: Job, changed: ChangeMap | None = None) -> None:
        if self._disk.sizing.locked():  # by storage that hangs, perhaps: not to be waited for
            raise ConfigError(f"{self._log.disk}: it is being resized; again")
        async with self._disk.sizing, self._life.turn:
            async with self._life.at_rest(PATIENCE_S):
                self._check_still(job.mirror.lower, job.size)
                if changed is not None:
                    job.mirror.lacks(changed)  # what was written before it came to rest, too
                await self._life.exchange(job.mirror)
            self._life.held_by = (
                f"it is being copied to {job.image}; wait for that, or give it up: "
                f"xvd {job.kind} --cancel"
            )
        self.job = job
        self._log.info("is being copied to %s (%s)", job.image, job.kind, event="copy-began")
        job.task = asyncio.create_task(self._drive(job))

    # ---- While it is made ----

    async def _drive(self, job: Job) -> None:
        try:
            await self._copy(job)
            if job.kind is Kind.BACKUP and not job.stop.is_set():
                await self._complete(job)
        except (OSError, XvdError) as error:
            job.why = describe(error)
            self._log.error(
                "the copy to %s has failed: %s", job.image, job.why, event="copy-failed"
            )
            await self._drop_at_last(job)

    async def _copy(self, job: Job) -> None:
        """Copy until a backup is ready, or somebody has it stopped."""
        while not job.stop.is_set():
            copied = await self._runtime.call(job.mirror.copy, STEP)
            job.copied += copied
            if copied < STEP and job.mirror.left <= NEAR:
                was, job.phase = job.phase, Phase.READY
                if job.kind is Kind.BACKUP:
                    return
                if was is not Phase.READY:
                    self._log.info("%s is the same by now", job.image, event="copy-same")
            if not copied:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(IDLE_S):
                        await job.stop.wait()

    async def _halt(self, job: Job) -> None:
        """Let the task end by itself: it may be in the middle of something."""
        job.stop.set()
        if job.task is not None:
            await job.task

    # ---- The end ----

    async def _complete(self, job: Job) -> None:
        """A backup: the state of the disk while nothing is in flight."""
        async with self._life.turn, self._life.at_rest(PATIENCE_S):
            await self._finish(job, PATIENCE_S)
            engine = job.mirror.lower
            if job.tracked:
                engine = self._tracking.begin(job.tracked, engine, job.image)
            await self._life.exchange(engine)
            self._over(job, Phase.DONE)
        await self._close(job.mirror.target)
        self._log.info("its content is in %s", job.image, event="copy-done")

    async def _pivot(self, job: Job, timeout_s: float) -> None:
        await self._halt(job)
        if job.phase in _OVER:
            raise ConfigError(f"{self._log.disk}: the mirror has failed: {job.why}")
        mirror = job.mirror
        try:
            async with self._life.turn, self._life.at_rest(timeout_s):
                await self._finish(job, timeout_s)
                target = self._tracking.moved(mirror.lower, mirror.target)
                await self._life.exchange(target, job.image)
                self._over(job, Phase.DONE)
        except BaseException:
            self._go_on(job)
            raise
        self._log.info("its storage is %s now", job.image, event="pivoted")
        await self._life.close_old(lambda: self._runtime.call(mirror.lower.close))
        await self._disk.follow_size()

    async def _finish(self, job: Job, timeout_s: float) -> None:
        """Have all of it copied, at rest. Raises as `Mirror.finish` does, or `TimeoutError`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._runtime.call(job.mirror.finish)
        except BaseException:
            job.mirror.stop()  # it may still be at it, in a thread of its own
            raise

    async def _give_up(self, job: Job) -> None:
        try:
            await self._drop(job, Phase.CANCELLED)
        except BaseException:
            self._go_on(job)
            raise

    def _go_on(self, job: Job) -> None:
        """Make a copy that was halted after all."""
        job.stop.clear()
        job.task = asyncio.create_task(self._drive(job))

    async def _drop_at_last(self, job: Job) -> None:
        """Let the disk go on without the copy, as soon as it can."""
        while not job.stop.is_set():
            try:
                await self._drop(job, Phase.FAILED)
            except (OSError, XvdError) as error:
                self._log.error(
                    "the copy to %s cannot be given up: %s",
                    job.image,
                    describe(error),
                    event="copy-failed",
                )
                await asyncio.sleep(IDLE_S)
            else:
                return

    async def _drop(self, job: Job, phase: Phase) -> None:
        """Let the disk go on without the copy. Raises as `StorageLife.at_rest` does."""
        async with self._life.turn, self._life.at_rest(PATIENCE_S):
            await self._life.exchange(job.mirror.lower)
        self._over(job, phase)
        if job.mirror.copies:  # somebody was not waited for
            leave_alone(self._close_later(job))
        else:
            await self._close(job.mirror.target, job.made)
        self._log.info("is not being copied any more", event="copy-given-up")

    async def _close_later(self, job: Job) -> None:
        while job.mirror.copies:  # noqa: ASYNC110
            await asyncio.sleep(IDLE_S)
        await self._close(job.mirror.target, job.made)

    def _over(self, job: Job, phase: Phase) -> None:
        job.phase = phase
        self._life.held_by = ""

    async def _close(self, target: Engine, made: str = "") -> None:
        """Close a target. made: an image that was made for nothing."""
        await self._life.close_old(lambda: self._runtime.call(target.close))
        _remove(made)
