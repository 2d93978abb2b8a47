# SPDX-License-Identifier: Apache-2.0
"""The engine in front of a storage daemon."""

import dataclasses
import errno
import os
import stat
import threading

from xvd.engines import hostuse
from xvd.engines.info import Snapshot, SnapshotAction
from xvd.engines.interface import Channel, Engine, EngineInfo, ThreadModel
from xvd.engines.qemu.images import change_snapshot
from xvd.engines.qemu.keeper import Keeper
from xvd.engines.qemu.nodes import NODE, Nodes, opened
from xvd.engines.vhost import VhostChannel
from xvd.errors import EngineError
from xvd.types import EngineOp


def _keep_host_away(nodes: Nodes, patience_s: float) -> int:
    """Claim a device that is to be written to, which QEMU does not; -1 where it is none.

    Raises `EngineError` where this host itself uses the image.
    """
    if not nodes.path or nodes.blockdev["read-only"]:
        return -1
    with opened(nodes.path) as fd:
        hostuse.check_file(fd, nodes.path)
        is_device = stat.S_ISBLK(os.fstat(fd).st_mode)
        return hostuse.claim(fd, nodes.path, patience_s) if is_device else -1


class QemuEngine(Engine):
    """A disk that a qemu-storage-daemon of our own serves. Raises `EngineError`.

    patience_s: how long to wait for a predecessor's lock on the image.
    """

    def __init__(self, nodes: Nodes, patience_s: float = 0.0) -> None:
        self._nodes = nodes
        self._identity = nodes.identity
        self._mutex = threading.Lock()
        self._own: VhostChannel | None = None
        self._claim_fd = _keep_host_away(nodes, patience_s)
        try:
            self.keeper = Keeper(nodes, patience_s)
        except BaseException:
            self._let_host_in()
            raise
        config = self.keeper.config
        self._info = EngineInfo(
            size=config.size,
            logical_block_size=config.block_size,
            physical_block_size=config.physical_block_size,
            read_only=config.read_only,
            can_discard=config.discard_max > 0 and not config.read_only,
            discard_granularity=config.discard_granularity,
            thread_model=ThreadModel.PARALLEL,
        )

    @property
    def info(self) -> EngineInfo:
        """Return what the daemon says of the disk."""
        return self._info

    @property
    def identity(self) -> str:
        """Which image it is, or where on the network."""
        return self._identity

    @property
    def trouble(self) -> str:
        """That its daemon is dead, while that is so."""
        return self.keeper.trouble

    def read(self, buffer: memoryview, offset: int) -> None:
        """Read, one at a time; queues have channels."""
        self._perform(EngineOp.READ, offset, buffer)

    def write(self, buffer: memoryview, offset: int) -> None:
        """Write, one at a time."""
        self._perform(EngineOp.WRITE, offset, buffer)

    def flush(self) -> None:
        """Flush."""
        self._perform(EngineOp.FLUSH, 0, 0)

    def discard(self, offset: int, length: int) -> None:
        """Discard."""
        self._perform(EngineOp.DISCARD, offset, length)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """Let the daemon have zeros without data, if it can."""
        if not self.keeper.config.zeroes_max:
            super().write_zeroes(offset, length, unmap=unmap)
        self._perform(EngineOp.WRITE, offset, length, unmap=unmap)

    def _perform(
        self, op: EngineOp, offset: int, data: memoryview | int, *, unmap: bool = False
    ) -> None:
        with self._mutex:
            if self._own is None:
                self._own = self.keeper.open_channel()
            number = self._own.perform(op, offset, data, unmap=unmap)
        if number:
            raise EngineError(number, "", self._nodes.path or None)

    def measure(self) -> int:
        """Ask the daemon; while there is none, it is as it was."""
        try:
            found = self.keeper.execute("query-named-block-nodes", flat=True)
        except EngineError:
            return self._info.size
        size = next(int(n["image"]["virtual-size"]) for n in found if n["node-name"] == NODE)
        size -= size % self._info.logical_block_size
        if size != self._info.size:
            self._info = dataclasses.replace(self._info, size=size)
        return size

    def resize(self, size: int) -> None:
        """Let the daemon resize it, if it can."""
        try:
            self.keeper.execute("block_resize", **{"node-name": NODE, "size": size})
        except EngineError as error:
            text = f"it cannot have {size} bytes: {error.strerror}"
            raise EngineError(error.errno or errno.EIO, text, self._nodes.path or None) from None

    def snapshots(self) -> list[Snapshot]:
        """List those within the image."""
        self._check_snapshots()
        found = self.keeper.execute("query-named-block-nodes", flat=True)
        described = next(n["image"] for n in found if n["node-name"] == NODE)
        return [Snapshot(one["name"], one["date-sec"]) for one in described.get("snapshots", ())]

    def snapshot(self, action: SnapshotAction, name: str) -> None:
        """Let qemu-img do it, while no daemon has the image."""
        self._check_snapshots()
        self.flush()
        self.keeper.without_daemon(lambda: change_snapshot(self._nodes.path, action, name))

    def _check_snapshots(self) -> None:
        driver = self._nodes.blockdev["driver"]
        if driver != "qcow2":
            text = f"{driver} keeps no snapshots; qcow2 does"
            raise EngineError(errno.EOPNOTSUPP, text, self._nodes.path or None)

    def open_channel(self) -> Channel:
        """A virtqueue of the daemon's."""
        return _Lease(self.keeper)

    def close(self) -> None:
        """Let the daemon write out what it has, and end."""
        self._own = None
        self.keeper.close()
        self._let_host_in()

    def _let_host_in(self) -> None:
        fd, self._claim_fd = self._claim_fd, -1
        if fd >= 0:
            os.close(fd)


class _Lease:
    """A channel, until it is closed."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._channel: VhostChannel | None = keeper.open_channel()

    @property
    def ports(self) -> object:
        """Capsule ``xvd.engine_ports``."""
        assert self._channel is not None
        return self._channel.ports

    def close(self) -> None:
        """Nothing may be in flight. Idempotent."""
        channel, self._channel = self._channel, None
        if channel is not None:
            self._keeper.give_back(channel)
