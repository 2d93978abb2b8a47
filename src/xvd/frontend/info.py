# SPDX-License-Identifier: Apache-2.0
"""What a disk is and what may be asked of it, by what its backend publishes and has withdrawn."""

import errno

from xvd.blkif.abi import InfoFlag, Op
from xvd.blkif.features import BackendFeatures, offered_operations
from xvd.types import RING_SECTOR_SIZE


class DiskInfo:
    """What a frontend knows of its disk. Raises OSError (ENODEV) before it is connected."""

    def __init__(self) -> None:
        self._features: BackendFeatures | None = None
        self._withdrawn: set[Op] = set()

    def _known(self) -> BackendFeatures:
        if self._features is None:
            raise OSError(errno.ENODEV, "the disk is not connected yet")
        return self._features

    @property
    def size(self) -> int:
        """Capacity in bytes."""
        return self._known().sectors * RING_SECTOR_SIZE

    @property
    def logical_block_size(self) -> int:
        """Smallest unit that the backend takes, bytes; this object takes any."""
        return self._known().sector_size

    @property
    def physical_block_size(self) -> int:
        """Smallest unit that the storage writes without reading first, bytes."""
        return self._known().physical_sector_size

    @property
    def read_only(self) -> bool:
        """Whether writes are refused."""
        return bool(self._known().info & InfoFlag.READONLY)

    @property
    def can_flush(self) -> bool:
        """Whether a flush reaches the medium; without it a flush succeeds and does nothing."""
        return self._works(Op.FLUSH_DISKCACHE) or self._works(Op.WRITE_BARRIER)

    @property
    def can_discard(self) -> bool:
        """Whether discard is offered."""
        return self._works(Op.DISCARD)

    @property
    def can_discard_securely(self) -> bool:
        """Whether the data is then beyond recovery, if asked."""
        return self.can_discard and self._known().discard_secure

    @property
    def discard_granularity(self) -> int:
        """Bytes: what is not a whole unit of these is not discarded; 0 without discard."""
        return self._discard_unit()[0] if self.can_discard else 0

    @property
    def discard_alignment(self) -> int:
        """Bytes from the beginning of the disk to the first unit."""
        return self._discard_unit()[1] if self.can_discard else 0

    def _discard_unit(self) -> tuple[int, int]:
        """(granularity, alignment); what is not in whole blocks makes no sense and is left out."""
        known, block = self._known(), self.logical_block_size
        unit = known.discard_granularity
        if unit == 0 or unit % block:
            unit = block
        return unit, known.discard_alignment % unit // block * block

    def _works(self, operation: Op) -> bool:
        """Whether the backend offers it, and has not said otherwise since."""
        offered = bool(offered_operations(self._known()) & 1 << operation)
        return offered and operation not in self._withdrawn

    @property
    def features(self) -> BackendFeatures:
        """The features that the backend publishes."""
        return self._known()

    # ---- Ranges ----

    def _check(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise OSError(
                errno.EINVAL, f"{length} bytes at {offset} are not on a disk of {self.size} bytes"
            )

    def _check_writable(self) -> None:
        if self.read_only:
            raise OSError(errno.EROFS, "the disk is read-only")

    def blocks_of(self, offset: int, length: int) -> tuple[int, int]:
        """Return the blocks that a range of bytes touches, as (first sector, sectors)."""
        block = self.logical_block_size
        start = offset // block * block
        end = -(-(offset + length) // block) * block
        return start // RING_SECTOR_SIZE, (end - start) // RING_SECTOR_SIZE
