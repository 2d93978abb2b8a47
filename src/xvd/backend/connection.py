# SPDX-License-Identifier: Apache-2.0
"""What a connected disk holds: a mapped ring, a bound port, a queue and its thread.

Made in one piece or not at all, and given back in the opposite order.
"""

from collections.abc import Callable
from pathlib import Path

from xvd.backend.features import offered_operations
from xvd.backend.journal import Journal
from xvd.blkif.abi import nr_ents
from xvd.blkif.nodes import BackendFeatures, FrontendConfig
from xvd.dataplane.queue import BackendQueue, unanswered
from xvd.dataplane.thread import QueueThread
from xvd.engines.interface import Engine
from xvd.errors import PeerProtocolError
from xvd.machine.interface import Machine
from xvd.types import RING_SECTOR_SIZE, Domid


class Connection:
    """One frontend, served. `on_exit` is called when its thread has ended, for whatever reason.

    state_dir: where the journal outlives this process, or None. resume: the ring is live, and was
    served by a predecessor.

    Raises `GrantError`, `EventChannelError`, `PeerProtocolError` or OSError, holding nothing.
    """

    def __init__(
        self,
        machine: Machine,
        peer: Domid,
        config: FrontendConfig,
        features: BackendFeatures,
        engine: Engine,
        *,
        name: str,
        copying: bool,
        state_dir: Path | None,
        resume: bool,
        on_exit: Callable[[Exception | None], None],
    ) -> None:
        self._undo: list[Callable[[], None]] = []
        self.config = config
        try:
            queue = config.queues[0]
            grants = machine.grants.foreign(peer)
            self._undo.append(grants.close)
            ring = grants.map(queue.ring_refs)
            self._undo.append(ring.close)
            self.channel = machine.event_channels.bind_interdomain(peer, queue.event_channel)
            self._undo.append(self.channel.close)
            storage = engine.open_channel()
            self._undo.append(storage.close)
            entries = nr_ents(config.ring_pages, config.abi)
            ring_name = f"{queue.ring_refs[0]}-{queue.event_channel}"
            self.journal = Journal(state_dir, name, ring_name, entries, resume=resume)
            if resume and not self.journal.found and unanswered(ring.view):
                raise PeerProtocolError(
                    "its ring holds requests of a backend that left no journal: what was answered "
                    "cannot be known; the frontend has to reconnect"
                )
            self.queue = BackendQueue(
                ring.view,
                entries,
                config.abi.number,
                grants,
                self.channel,
                storage,
                capacity=features.sectors,
                logical_sectors=features.sector_size // RING_SECTOR_SIZE,
                read_only=engine.info.read_only,
                offered=offered_operations(features),
                indirect_max=features.max_indirect_segments,
                copying=copying,
                journal=self.journal.memory,
            )
            self.thread = QueueThread(self.queue, name, on_exit)
        except BaseException:
            self.release()
            raise

    def kick(self) -> None:
        """One event to the frontend: responses of a predecessor may lie there unannounced."""
        self.channel.notify()

    def release(self) -> None:
        """Unmap and unbind; only after the thread has ended."""
        while self._undo:
            self._undo.pop()()
