# SPDX-License-Identifier: Apache-2.0
"""The emulated machine itself: its domains, and what each process of a domain has taken.

The host does what the hypervisor does on the slow path: it hands out memory, grant references and
ports, and cleans up after the dead. What is fast (mapping, copying, notifying) the processes do
themselves in shared memory (shared.pyx). A `Session` is one process's connection to one domain, as
the open device files are on Linux: closing it, or dying, gives everything back.

Thread rules: every method may be called from any thread; one lock guards the accounting.
"""

import errno
import fcntl
import mmap
import os
import threading
from dataclasses import dataclass, field

from xvd.errors import DiskInUse, EventChannelError, GrantError
from xvd.machine.emulated.limits import Limits
from xvd.machine.emulated.shared import DomainState, clean_session, heap_bytes
from xvd.types import PAGE_SIZE, Domid, GrantStatus, Gref, Port

RESERVED_GREFS = 8
"""References 0..7 are not handed out: 0 is the console's and 1 xenstore's (grant_table.h)."""

_FREE, _UNBOUND, _INTERDOMAIN = 0, 1, 2


@dataclass(slots=True)
class _Shared:
    frame: int
    grefs: list[Gref]


@dataclass(slots=True)
class _Channel:
    """The two eventfds of a channel: end 0, which was allocated, waits on the first."""

    fds: tuple[int, int]
    users: int = 1


@dataclass(slots=True)
class _End:
    channel: _Channel
    side: int
    session: int


@dataclass(slots=True)
class _Domain:
    state: DomainState
    memory_fd: int
    heap_fd: int
    limits: Limits
    free_frames: list[tuple[int, int]]
    free_grefs: list[Gref]
    channels: dict[int, _End] = field(default_factory=dict)
    shares: dict[int, list[_Shared]] = field(default_factory=dict)
    claims: dict[int, int] = field(default_factory=dict)  # a frontend's session, by vdev
    deferred: list[_Shared] = field(default_factory=list)


def _sealed_memory(name: str, size: int) -> int:
    """Memory of a size that nobody who gets its descriptor can change: a domain that cut its own
    short would end by SIGBUS every process that has mapped it."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd


def _new_domain(domid: Domid, limits: Limits, generation: int) -> _Domain:
    memory_fd = _sealed_memory(f"xvd-domain-{domid}", limits.pages * PAGE_SIZE)
    heap_fd = _sealed_memory(f"xvd-heap-{domid}", heap_bytes(limits))
    os.pwrite(heap_fd, (generation & 0xFFFF).to_bytes(4, "little"), 0)
    # Whole pages of the kernel, so that any frame handed out can be mapped.
    table_frames = -(-limits.grefs * 8 // mmap.PAGESIZE) * (mmap.PAGESIZE // PAGE_SIZE)
    return _Domain(
        state=DomainState(domid, memory_fd, heap_fd, limits),
        memory_fd=memory_fd,
        heap_fd=heap_fd,
        limits=limits,
        free_frames=[(table_frames, limits.pages - table_frames)],
        free_grefs=[Gref(g) for g in range(limits.grefs - 1, RESERVED_GREFS - 1, -1)],
    )


class Host:
    """All domains of one emulated machine."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._lock = threading.RLock()
        self._domains: dict[Domid, _Domain] = {}
        self._sessions: dict[int, Session] = {}
        self._last_session = 0
        self._generation = 0

    # ---- Domains ----

    def create_domain(self, domid: Domid, limits: Limits | None = None) -> None:
        """Make a domain; nothing happens if it exists."""
        with self._lock:
            if domid not in self._domains:
                self._domains[domid] = _new_domain(domid, limits or self.limits, self._generation)
                self._generation += 1

    def destroy_domain(self, domid: Domid) -> None:
        """Close the domain's sessions and forget it. Its memory lives while a peer maps it."""
        with self._lock:
            for session in [s for s in self._sessions.values() if s.domid == domid]:
                session.close()
            domain = self._domains.pop(domid, None)
            if domain is not None:
                os.close(domain.memory_fd)
                os.close(domain.heap_fd)

    def domids(self) -> list[Domid]:
        """The domains there are."""
        with self._lock:
            return sorted(self._domains)

    def open(self, domid: Domid) -> "Session":
        """Open a session of a domain; raises `GrantError` (bad domain) if there is none."""
        with self._lock:
            self._domain(domid)
            number = self._free_session_number()
            session = Session(self, number, domid)
            self._sessions[number] = session
            return session

    def close(self) -> None:
        """Close every session and destroy every domain."""
        with self._lock:
            for domid in list(self._domains):
                self.destroy_domain(domid)

    def accounting(self) -> dict[str, int]:
        """Count what is taken now, over all domains. All zero when everybody gave back."""
        with self._lock:
            self._reap_deferred()
            domains = self._domains.values()
            return {
                "sessions": len(self._sessions),
                "pins": sum(d.state.pins() for d in domains),
                "mappings": sum(d.state.tracks_in_use() for d in domains),
                "ports": sum(len(d.channels) for d in domains),
                "pages": sum(len(s.grefs) for d in domains for s in self._held(d)),
            }

    # ---- Inside ----

    @staticmethod
    def _held(domain: _Domain) -> list[_Shared]:
        return [s for shares in domain.shares.values() for s in shares] + domain.deferred

    def _free_session_number(self) -> int:
        for _ in range(0xFFFF):
            self._last_session = self._last_session % 0xFFFF + 1
            if self._last_session not in self._sessions:
                return self._last_session
        raise GrantError("65535 processes hold this machine open", GrantStatus.NO_SPACE)

    def _domain(self, domid: Domid) -> _Domain:
        domain = self._domains.get(domid)
        if domain is None:
            raise GrantError(f"there is no domain {domid} on this machine", GrantStatus.BAD_DOMAIN)
        return domain

    def _take_frames(self, domain: _Domain, count: int) -> int:
        for i, (frame, size) in enumerate(domain.free_frames):
            if size >= count:
                rest = [(frame + count, size - count)] if size > count else []
                domain.free_frames[i : i + 1] = rest
                return frame
        raise GrantError(
            f"domain {domain.state.domid} has no {count} contiguous pages left of "
            f"{domain.limits.pages}; raise its memory limit",
            GrantStatus.NO_SPACE,
        )

    @staticmethod
    def _give_frames(domain: _Domain, frame: int, count: int) -> None:
        merged: list[tuple[int, int]] = []
        for start, size in sorted([*domain.free_frames, (frame, count)]):
            if merged and sum(merged[-1]) == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + size)
            else:
                merged.append((start, size))
        domain.free_frames[:] = merged

    def _free_share(self, domain: _Domain, share: _Shared) -> bool:
        """Free pages once every reference is revoked; False while a peer still maps one."""
        revoked = [domain.state.try_revoke(gref) for gref in share.grefs]
        if not all(revoked):
            return False
        domain.free_grefs.extend(reversed(share.grefs))
        self._give_frames(domain, share.frame, len(share.grefs))
        return True

    def _reap_deferred(self) -> None:
        for domain in self._domains.values():
            domain.deferred = [s for s in domain.deferred if not self._free_share(domain, s)]

    def _close_session(self, session: "Session") -> None:
        with self._lock:
            if self._sessions.pop(session.number, None) is None:
                return
            domain = self._domains[session.domid]
            domain.claims = {v: n for v, n in domain.claims.items() if n != session.number}
            mine = [p for p, end in domain.channels.items() if end.session == session.number]
            for port in mine:
                self._close_port(domain, port)
            states = {d: domain.state for d, domain in self._domains.items()}
            clean_session(domain.state, states, session.number)
            domain.deferred += domain.shares.pop(session.number, [])
            self._reap_deferred()

    def _close_port(self, domain: _Domain, port: int) -> None:
        """Free our end; the peer's end becomes unbound, reserved for us (event_channel.c)."""
        channel = domain.channels.pop(port).channel
        state, remote_domid, remote_port, _, _ = domain.state.port(port)
        domain.state.set_port(port, _FREE, 0, 0, 0)
        peer = self._domains.get(Domid(remote_domid))
        if state == _INTERDOMAIN and peer is not None:
            owner = peer.state.port(remote_port)[4]
            peer.state.set_port(remote_port, _UNBOUND, domain.state.domid, 0, owner)
        channel.users -= 1
        if channel.users == 0:
            for fd in channel.fds:
                os.close(fd)


class Session:
    """The calls of one process of one domain; `link` offers the same over a socket."""

    def __init__(self, host: Host, number: int, domid: Domid) -> None:
        self.host = host
        self.number = number
        self.domid = domid

    def state(self, domid: Domid) -> tuple[int, int, Limits]:
        """A domain's (memory descriptor, heap descriptor, limits).

        Here and below the descriptors are duplicates: the caller closes them.
        """
        with self.host._lock:
            domain = self.host._domain(domid)
            return os.dup(domain.memory_fd), os.dup(domain.heap_fd), domain.limits

    def share(self, peer: Domid, count: int) -> tuple[int, list[Gref]]:
        """Take `count` contiguous zeroed pages and as many references: (first frame, grefs)."""
        with self.host._lock:
            self.host._domain(peer)
            self.host._reap_deferred()
            domain = self.host._domain(self.domid)
            if count < 1:
                raise GrantError(
                    f"at least one page is shared, not {count}", GrantStatus.GENERAL_ERROR
                )
            if count > len(domain.free_grefs):
                raise GrantError(
                    f"domain {self.domid} has {len(domain.free_grefs)} grant references left, "
                    f"{count} are needed; detach a disk or raise its limit",
                    GrantStatus.NO_SPACE,
                )
            frame = self.host._take_frames(domain, count)
            grefs = [domain.free_grefs.pop() for _ in range(count)]
            domain.state.zero(frame, count)
            domain.shares.setdefault(self.number, []).append(_Shared(frame, grefs))
            return frame, grefs

    def unshare(self, frame: int) -> None:
        """Give pages back that `share` handed out; deferred while the peer maps one."""
        with self.host._lock:
            domain = self.host._domains.get(self.domid)
            if domain is None:
                return  # destroyed, and its memory with it
            shares = domain.shares.get(self.number, [])
            share = next((s for s in shares if s.frame == frame), None)
            if share is not None:
                shares.remove(share)
                domain.deferred.append(share)
            self.host._reap_deferred()

    def alloc_unbound(self, peer: Domid) -> tuple[Port, int, int]:
        """A new port for `peer` to bind: (port, descriptor to wait on, the peer's descriptor)."""
        with self.host._lock:
            domain = self.host._domain(self.domid)
            self.host._domain(peer)
            port = self._free_port(domain)
            flags = os.EFD_CLOEXEC | os.EFD_NONBLOCK
            channel = _Channel((os.eventfd(0, flags), os.eventfd(0, flags)))
            domain.channels[port] = _End(channel, 0, self.number)
            domain.state.set_port(port, _UNBOUND, peer, 0, self.number)
            return Port(port), os.dup(channel.fds[0]), os.dup(channel.fds[1])

    def bind_interdomain(self, peer: Domid, remote: Port) -> tuple[Port, int, int]:
        """Bind to the peer's unbound port, as `alloc_unbound`; our end has an event pending."""
        with self.host._lock:
            domain = self.host._domain(self.domid)
            other = self.host._domain(peer)
            end = other.channels.get(remote)
            if end is None or other.state.port(remote)[:2] != (_UNBOUND, self.domid):
                raise EventChannelError(
                    f"port {remote} of domain {peer} is not unbound and meant for domain "
                    f"{self.domid}",
                    errno.EINVAL,
                )
            port = self._free_port(domain)
            end.channel.users += 1
            side = 1 - end.side
            domain.channels[port] = _End(end.channel, side, self.number)
            domain.state.set_port(port, _INTERDOMAIN, peer, remote, self.number)
            other.state.set_port(remote, _INTERDOMAIN, self.domid, port, end.session)
            mine, theirs = end.channel.fds[side], end.channel.fds[end.side]
            if domain.state.set_pending(port):
                os.eventfd_write(mine, 1)
            return Port(port), os.dup(mine), os.dup(theirs)

    def unbind(self, port: Port) -> None:
        """Close one of this session's ports; nothing happens if it is not."""
        with self.host._lock:
            domain = self.host._domains.get(self.domid)
            end = domain.channels.get(port) if domain else None
            if domain and end and end.session == self.number:
                self.host._close_port(domain, port)

    def claim(self, vdev: int) -> None:
        """Become the frontend of a disk; `DiskInUse` if there is one, in whatever process."""
        with self.host._lock:
            claims = self.host._domain(self.domid).claims
            if vdev in claims:
                raise DiskInUse("another frontend uses the disk; end that one first")
            claims[vdev] = self.number

    def disclaim(self, vdev: int) -> None:
        """Stop being its frontend; nothing happens if we are not."""
        with self.host._lock:
            domain = self.host._domains.get(self.domid)
            if domain is not None and domain.claims.get(vdev) == self.number:
                del domain.claims[vdev]

    def close(self) -> None:
        """Give everything back, as a process that dies does."""
        self.host._close_session(self)

    @staticmethod
    def _free_port(domain: _Domain) -> int:
        for port in range(1, domain.limits.ports):
            if port not in domain.channels:
                return port
        raise EventChannelError(
            f"domain {domain.state.domid} has all of its {domain.limits.ports - 1} ports in use",
            errno.ENOSPC,
        )
