# SPDX-License-Identifier: Apache-2.0
"""What must hold of a disk's copies, watched from outside the code under test.

A disk that goes on with other storage finds there what may be on the disk. A backup that is whole
is byte for byte what the disk was at that moment, and stays so. What has changed since the last
backup of a name is marked, whoever has died meanwhile: the map may say more and never less.
"""

from typing import Final

from xvd.backend.copies import Job, Kind, Phase
from xvd.backend.device import Device
from xvd.engines.changes import GRANULE
from xvd.sim.checkers import SECTOR, CheckFailed, ModelDisk
from xvd.sim.storages import Storages

NAME: Final = "nightly"
"""Of the backups that have only what has changed."""
_NOW_AND_THEN: Final = 64
"""Looks from one at all that is kept to the next."""


class CopyChecks:
    """Looks at a disk and its copies after each step."""

    def __init__(self, storages: Storages, model: ModelDisk) -> None:
        self.pivots = 0
        self.backups = 0
        self._storages = storages
        self._model = model
        self._job: Job | None = None
        self._is_done = True
        self._may_begin = False
        """Whether a backup of a name may have begun its map since the last look."""
        self._whole: dict[str, bytes] = {}
        """Backups that are whole, by their storages' names, and what is in them."""
        self._reference: bytes | None = None
        """What the disk was when the map of `NAME` was begun; None: there is none."""
        self._looks = 0

    def look(self, device: Device | None) -> None:
        """Check what has come to be. device: while a backend has the disk's storage open."""
        self._looks += 1
        if self._looks % _NOW_AND_THEN == 0:
            self.check_whole()
        if device is None:
            return
        self._follow(device)
        self._look_at_job(device.copies.job)
        if self._may_begin or self._looks % _NOW_AND_THEN == 0:
            self._check_map(device)

    def check_all(self, device: Device | None) -> None:
        """Check everything now, of a disk that nobody has left in the middle of something."""
        self.check_whole()
        self._model.check_content(self._content(), "the disk")
        if device is not None:
            self._check_map(device)

    # ---- The disk's own storage ----

    def _follow(self, device: Device) -> None:
        """See whether the disk has other storage now."""
        assert device.assignment is not None
        image, before = device.assignment.image, self._storages.image
        self._storages.image = image
        if self._storages.name_of(image) != self._storages.name_of(before):
            self.pivots += 1
            self._model.check_content(self._content(), f"{image}, which took {before}'s place,")

    def _content(self) -> bytes:
        disk = self._storages.disk
        return disk.content(disk.sectors * SECTOR)

    # ---- Backups ----

    def _look_at_job(self, job: Job | None) -> None:
        if job is not self._job:
            self._job, self._is_done = job, False
            if job is not None:
                self._whole.pop(self._storages.name_of(job.image), None)
        if job is not None and job.task is not None and job.task.done():
            job.task.result()  # it says itself what went wrong, and nothing else may
        self._may_begin = job is not None and bool(job.tracked) and not self._is_done
        if job is not None and job.phase is Phase.DONE and not self._is_done:
            self._is_done = True
            if job.kind is Kind.BACKUP:
                self._check_backup(job)

    def _check_backup(self, job: Job) -> None:
        """Check a backup that is whole since the last step: nothing has changed meanwhile."""
        self.backups += 1
        here, there = self._content(), self._storages.of(job.image).content(job.size)
        if here != there:
            sector = next(at for at in range(len(here)) if here[at : at + 1] != there[at : at + 1])
            raise CheckFailed(
                f"the backup in {job.image} differs from sector {sector // SECTOR} on"
            )
        self._model.check_content(there, f"the backup in {job.image}")
        self._whole[self._storages.name_of(job.image)] = there

    def check_whole(self) -> None:
        """Check that nobody has changed a backup."""
        for name, content in self._whole.items():
            if self._storages.of(name).content(len(content)) != content:
                raise CheckFailed(f"the backup in {name} is not any more what it was")

    # ---- What has changed ----

    def _check_map(self, device: Device) -> None:
        if NAME not in device.tracking.names:
            self._reference = None
            return
        content = self._content()
        last = device.tracking.last(NAME, len(content))
        if last is None:
            return  # of another size: everything counts as changed
        if self._reference is not None and len(self._reference) == len(content):
            differ = [at for at in range(0, len(content), GRANULE) if self._differs(content, at)]
            if all(last.changed.is_marked(at) for at in differ):
                return
        # A map begins anew while a backup is whole and nothing is under way.
        if not self._may_begin or self._storages.of(last.image).content(len(content)) != content:
            raise CheckFailed(f"of what has changed since backup {NAME} not everything is marked")
        self._reference = content

    def _differs(self, content: bytes, at: int) -> bool:
        assert self._reference is not None
        return content[at : at + GRANULE] != self._reference[at : at + GRANULE]
