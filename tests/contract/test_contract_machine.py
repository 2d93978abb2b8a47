# SPDX-License-Identifier: Apache-2.0
"""A connection to a domain: it gives everything back, closed or killed, and others go on."""

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterator

import pytest
from rig_machine import GRANTER, MAPPER, OTHER, HostThread, Pair, wait_for_accounting
from rig_queue import NOTHING

from xvd.errors import ConfigError, EventChannelError, GrantError, PeerClosed
from xvd.machine.emulated.link import LinkClient
from xvd.machine.emulated.machine import EmulatedMachine
from xvd.machine.emulated.service import EmulatedHost, connect
from xvd.machine.xs.messages import Message, MessageType
from xvd.types import Domid


@pytest.mark.beyond_xen("accounting")
def test_closing_a_machine_gives_back_what_was_made_through_it(pair: Pair) -> None:
    granter, mapper = pair.another(GRANTER), pair.another(MAPPER)
    pages = granter.grants.share(MAPPER, 3)
    end = granter.event_channels.alloc_unbound(MAPPER)
    mapper.event_channels.bind_interdomain(GRANTER, end.port)
    mapper.grants.foreign(GRANTER).map(pages.grefs)
    mapper.close()
    granter.close()
    wait_for_accounting(pair.host, NOTHING | {"sessions": 2})


@pytest.mark.beyond_xen("accounting")
def test_closing_a_machine_twice_and_its_things_after_it(pair: Pair) -> None:
    granter = pair.another(GRANTER)
    pages = granter.grants.share(MAPPER, 3)
    end = granter.event_channels.alloc_unbound(MAPPER)
    granter.close()
    granter.close()
    end.close()
    pages.close()
    wait_for_accounting(pair.host, NOTHING | {"sessions": 2})


@pytest.mark.beyond_xen("third_domain")
def test_closing_what_belonged_to_a_domain_that_was_destroyed(pair: Pair) -> None:
    stranger = pair.another(OTHER)
    pages = stranger.grants.share(MAPPER, 1)
    end = stranger.event_channels.alloc_unbound(MAPPER)
    pair.host.destroy_domain(OTHER)
    pages.close()
    end.close()
    stranger.close()
    assert OTHER not in pair.host.domids()


@pytest.mark.beyond_xen("accounting", "third_domain")
def test_a_mapping_survives_the_domain_it_came_from(pair: Pair) -> None:
    pages = pair.another(OTHER).grants.share(MAPPER, 1)
    mapping = pair.mapper.grants.foreign(OTHER).map(pages.grefs)
    pair.host.destroy_domain(OTHER)
    mapping.view[0] = 1
    mapping.close()
    assert pair.host.accounting()["mappings"] == 0


@pytest.mark.beyond_xen("third_domain")
def test_a_domain_made_again_under_the_same_number_is_another_one(pair: Pair) -> None:
    old = pair.another(OTHER).grants.share(MAPPER, 1)
    stale = pair.mapper.grants.foreign(OTHER)
    mapping = stale.map(old.grefs)
    pair.host.destroy_domain(OTHER)
    pair.host.create_domain(OTHER)
    new = pair.another(OTHER).grants.share(MAPPER, 1)
    new.view[:3] = b"new"
    fresh = pair.mapper.grants.foreign(OTHER).map(new.grefs)
    seen = bytes(fresh.view[:3])
    fresh.close()
    mapping.close()
    stale.close()
    assert seen == b"new"


@pytest.mark.beyond_xen("unknown_domain")
def test_no_stake_in_a_domain_that_is_not_there(pair: Pair) -> None:
    with pytest.raises(GrantError, match="no domain 99"):
        pair.open_existing(Domid(99))


@pytest.fixture
def served() -> Iterator[HostThread]:
    host = HostThread()
    yield host
    host.close()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_channels_and_shares_across_the_socket_leave_no_descriptors(served: HostThread) -> None:
    machine = served.machine(GRANTER)
    machine.event_channels.alloc_unbound(MAPPER).close()
    before = descriptors()
    for _ in range(20):
        machine.event_channels.alloc_unbound(MAPPER).close()
        machine.grants.share(MAPPER, 1).close()
    after = descriptors()
    machine.close()
    assert after <= before  # a thread of the host may have been closing the socket of another test


def test_machines_across_the_socket_leave_no_descriptors(served: HostThread) -> None:
    served.machine(GRANTER).close()
    wait_for_accounting(served.host, NOTHING)
    before = descriptors()
    for _ in range(20):
        machine = served.machine(GRANTER)
        machine.grants.share(MAPPER, 1)
        machine.event_channels.alloc_unbound(MAPPER)
        machine.close()
        del machine
        wait_for_accounting(served.host, NOTHING)
    assert descriptors() <= before + 3  # a thread of the host may still be closing its socket


def fork(work: Callable[[int], None]) -> tuple[int, int]:
    """A process that runs `work(pipe)` for ever: (pid, the other end of its pipe)."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(ours)
            work(theirs)
        finally:
            os._exit(1)
    os.close(theirs)
    return pid, ours


def kill(pid: int, pipe: int) -> None:
    os.kill(pid, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    os.close(pipe)


@pytest.mark.slow
def test_a_process_killed_between_any_two_instructions_holds_nothing(served: HostThread) -> None:
    """Mapping, copying, unmapping, sharing, binding, until SIGKILL; 30 times over."""
    granter = served.machine(GRANTER)
    pages = granter.grants.share(MAPPER, 4)
    port = granter.event_channels.alloc_unbound(MAPPER)
    own = served.host.accounting()

    def prey(pipe: int) -> None:
        machine = connect(served.directory, MAPPER)
        grants = machine.grants.foreign(GRANTER)
        machine.event_channels.bind_interdomain(GRANTER, port.port)
        machine.grants.share(GRANTER, 2)
        while True:
            for _ in range(10):
                both = grants.map(pages.grefs)
                once = grants.map(pages.grefs[:1], writable=False)
                grants.write(pages.grefs[1], 0, b"x" * 4096)
                both.close()
                grants.read(pages.grefs[2], 0, 4096)
                once.close()
            os.write(pipe, b".")

    for turn in range(30):
        pid, pipe = fork(prey)
        os.read(pipe, 1 + turn % 3)
        kill(pid, pipe)
        wait_for_accounting(served.host, own)
        state = granter.state(GRANTER)
        assert {state.entry(gref)[0] for gref in pages.grefs} == {1}
    assert all(pages.revoke(page) for page in range(4))
    granter.close()
    wait_for_accounting(served.host, NOTHING)


def watch_a_hundred(machine: EmulatedMachine) -> socket.socket:
    """Four fifths of what a guest may watch; raw, because a forked process has no event loop."""
    calls = machine.calls
    assert isinstance(calls, LinkClient)
    store = calls.xenstore()
    store.setblocking(True)
    for i in range(100):
        store.sendall(Message(MessageType.WATCH, i, 0, b"/local\0%d\0" % i).pack())
    received = b""
    while received.count(b"OK\0") < 100:
        chunk = store.recv(65536)
        assert chunk
        received += chunk
    return store


@pytest.mark.slow
def test_a_process_killed_with_watches_leaves_room_for_the_next(served: HostThread) -> None:
    async def introduce() -> None:
        dom0 = served.service.machine(Domid(0))
        async with await dom0.xenstore() as store:
            await store.introduce(GRANTER, 0, 1)
        dom0.close()

    asyncio.run_coroutine_threadsafe(introduce(), served._loop).result()

    def prey(pipe: int) -> None:
        held = watch_a_hundred(served.machine(GRANTER))
        os.write(pipe, b".")
        held.recv(1)
        signal.pause()

    for _ in range(5):
        pid, pipe = fork(prey)
        assert os.read(pipe, 1) == b"."
        kill(pid, pipe)
        wait_for_accounting(served.host, NOTHING)


def test_a_host_that_stops_is_a_peer_that_closed(served: HostThread) -> None:
    machine = served.machine(GRANTER)
    pages = machine.grants.share(MAPPER, 1)
    served.service._link.close()
    with pytest.raises(PeerClosed, match="host"):
        machine.grants.share(MAPPER, 1)
    pages.close()
    machine.close()


def test_no_host_there(tmp_path: os.PathLike[str]) -> None:
    with pytest.raises(PeerClosed, match=r"no host answers .*; start one: xvd host DIR"):
        connect(tmp_path, Domid(0))


def test_a_second_host_in_the_same_place(served: HostThread) -> None:
    async def listen() -> None:
        async with EmulatedHost() as second:
            await second.listen(served.directory)

    with pytest.raises(ConfigError, match="answers there already"):
        asyncio.run(listen())


def test_a_guest_may_not_act_as_the_toolstack(served: HostThread) -> None:
    link = LinkClient(served.directory / "machine", GRANTER)
    for call in (lambda: link.destroy_domain(OTHER), lambda: link.create_domain(Domid(9))):
        with pytest.raises(ConfigError, match="only domain 0"):
            call()
    link.close()


@pytest.mark.parametrize(
    "packet",
    [b"", b"{", b"[]", b'["share",[0,1]]', b'["open",[99,0]]', b'["open",["a"]]', b"\xff" * 1000,
     b'["open",[1,99]]', b'["open",[1,1e99]]'],
)  # fmt: skip
def test_nonsense_on_the_machine_socket_costs_its_sender_only(
    served: HostThread, packet: bytes
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect(str(served.directory / "machine"))
        sock.send(packet)
        sock.shutdown(socket.SHUT_WR)
        sock.recv(65536)
    machine = served.machine(GRANTER)
    machine.grants.share(MAPPER, 1)
    machine.close()


@pytest.mark.parametrize(
    ("call", "arguments"),
    [("share", [0]), ("share", [0, -5]), ("share", [0, 1, 2]), ("unshare", [12345]),
     ("unbind", [-1]), ("bind_interdomain", [0, -1]), ("state", [2**40]), ("nonsense", []),
     ("close", []), ("call", [])],
)  # fmt: skip
def test_calls_that_make_no_sense_are_answered(
    served: HostThread, call: str, arguments: list[int]
) -> None:
    link = LinkClient(served.directory / "machine", GRANTER)
    with contextlib.suppress(ConfigError, GrantError, EventChannelError):
        link.call(call, *arguments)
    assert link.share(MAPPER, 1)
    link.close()


def test_it_is_not_a_socket(tmp_path: os.PathLike[str]) -> None:
    async def listen() -> None:
        open(os.path.join(tmp_path, "machine"), "w").close()  # noqa: ASYNC230
        async with EmulatedHost() as host:
            await host.listen(tmp_path)

    with pytest.raises(ConfigError, match="is not a socket"):
        asyncio.run(listen())
