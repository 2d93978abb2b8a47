# SPDX-License-Identifier: Apache-2.0
"""One frontend for each disk of a Xen domain: a lock among ours, and a check of the kernel's."""

import errno
import fcntl
import os
from pathlib import Path
from typing import Final

from xvd.errors import ConfigError, DiskInUse

LOCKS: Final = Path("/run/xvd/frontends")
KERNELS: Final = Path("/sys/bus/xen/drivers/vbd")
"""Where xen-blkfront shows the disks that it has."""


class XenClaim:
    """`machine.interface.Claim`: a locked file, which the kernel unlocks when we die.

    Raises `DiskInUse` if another process of ours, or the kernel's driver, has the disk, and
    `ConfigError` if the lock cannot be made.
    """

    def __init__(self, vdev: int, *, locks: Path = LOCKS, kernels: Path = KERNELS) -> None:
        self._fd = -1
        if (kernels / f"vbd-{vdev}").exists():
            raise DiskInUse(f"xen-blkfront uses the disk: echo vbd-{vdev} > {kernels}/unbind")
        try:
            locks.mkdir(mode=0o700, parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._fd = os.open(locks / str(vdev), flags, 0o600)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            if error.errno == errno.EWOULDBLOCK:
                raise DiskInUse("another frontend uses the disk; end that one first") from None
            raise ConfigError(f"{locks}: cannot lock a disk there: {error.strerror}") from None

    def close(self) -> None:
        """Let another frontend have the disk."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
