# SPDX-License-Identifier: Apache-2.0
"""What may go wrong in a disk's life, and how often: drawn from the seed.

Beside what the queues suffer (faults.py): the store is slow, refuses a commit, or is lost to the
backend; either process dies at any point of a handshake; a successor is set up in another way; a
journal is lost or damaged; the toolstack attaches, detaches, resizes and changes settings at any
moment, and pauses the disk and gives it other storage; mirrors, backups and incremental backups of
it are begun, ended and given up, and what they are written to fails and hangs as the disk's own
storage does; the storage cannot be opened for a while, or hangs; the guest is destroyed; the power
fails, and with it the maps of what has changed are lost.
"""

from dataclasses import dataclass, field
from pathlib import Path

from xvd.backend.settings import Settings as BackSettings
from xvd.frontend.settings import Settings as FrontSettings
from xvd.sim.prng import Prng


@dataclass(slots=True)
class DeviceFaults:
    """One in so many chances at each step; 0 is never. spared: of the faults before the disk is in
    use only one in so many comes, as a handshake takes some thousand steps, and few would come to
    an end. delays_ms: what a message to or from the store may take."""

    storage_error: int = 0
    lost_event: int = 0
    conflict: int = 0
    back_death: int = 0
    front_death: int = 0
    power_loss: int = 0
    store_loss: int = 0
    journal: int = 0
    tool: int = 0
    no_storage: int = 0
    hang: int = 0
    guest_end: int = 0
    copy: int = 0
    spared: int = 1
    delays_ms: tuple[int, ...] = field(default=(0,))

    @classmethod
    def draw(cls, prng: Prng) -> "DeviceFaults":
        """Any mix, from none at all to everything: half of the kinds are off in a run."""

        return cls(
            storage_error=prng.maybe(20, 100),
            lost_event=prng.maybe(5, 50),
            conflict=prng.maybe(50, 300),
            back_death=prng.maybe(400, 1500),
            front_death=prng.maybe(800, 2000),
            power_loss=prng.maybe(1500, 3000),
            store_loss=prng.maybe(800, 2000),
            journal=prng.maybe(5, 30),
            tool=prng.maybe(150, 600),
            delays_ms=prng.choose(((0,), (0, 0, 1), (0, 1, 20), (0, 0, 0, 3000))),
            no_storage=prng.maybe(300, 1000),
            hang=prng.maybe(100, 400),
            guest_end=prng.maybe(800, 2000),
            spared=prng.choose((1, 20, 20)),
            copy=prng.maybe(40, 300),
        )

    def delay_ns(self, prng: Prng) -> int:
        """How long the next messages of a connection take."""
        return prng.choose(self.delays_ms) * 1_000_000

    @staticmethod
    def draw_settings(prng: Prng, directory: Path) -> BackSettings:
        """How a backend is set up that begins now."""
        return BackSettings(
            state_dir=directory,
            copying=prng.chance(4),
            max_queues=prng.choose((1, 2, 4)),
            max_ring_page_order=prng.choose((0, 1, 2)),
            max_indirect_segments=prng.choose((0, 32, 256)),
            feature_persistent=not prng.chance(3),
            max_persistent_grants=prng.choose((8, 1056)),
            on_error=prng.choose(("report", "hold")),
        )

    @staticmethod
    def draw_front_settings(prng: Prng) -> FrontSettings:
        """How a frontend is set up that begins now."""
        return FrontSettings(
            max_queues=prng.choose((1, 2, 4)),
            max_ring_page_order=prng.choose((0, 1)),
            max_indirect_segments=prng.choose((0, 32)),
            feature_persistent=not prng.chance(3),
            pool_pages=prng.choose((64, 352)),
        )
