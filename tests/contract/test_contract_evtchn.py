# SPDX-License-Identifier: Apache-2.0
"""What event channels do on every machine."""

import errno
import select

import pytest
from rig_machine import GRANTER, MAPPER, ON_XEN, OTHER, Pair

from xvd.errors import EventChannelError, GrantError
from xvd.machine.emulated.evtchn import EmulatedEventChannel
from xvd.types import Domid, Port


def bound(pair: Pair) -> tuple[EmulatedEventChannel, EmulatedEventChannel]:
    """Two ends with nothing pending."""
    first = pair.granter.event_channels.alloc_unbound(MAPPER)
    second = pair.mapper.event_channels.bind_interdomain(GRANTER, first.port)
    taken(second)
    return first, second


def readable(end: EmulatedEventChannel) -> bool:
    """Whether an event is there; on real Xen it is an interrupt, which takes its time."""
    return bool(select.select([end.fileno()], [], [], 0.2 if ON_XEN else 0)[0])


def taken(end: EmulatedEventChannel) -> bool:
    return readable(end) and end.consume()


def test_an_event_arrives_at_the_other_end(pair: Pair) -> None:
    first, second = bound(pair)
    first.notify()
    assert (readable(first), readable(second)) == (False, True)
    assert [taken(second), second.consume()] == [True, False]
    assert not readable(second)


def test_events_go_both_ways(pair: Pair) -> None:
    first, second = bound(pair)
    second.notify()
    assert (taken(first), taken(second)) == (True, False)


def test_events_on_a_pending_port_are_one_event(pair: Pair) -> None:
    """On real Xen the first may be on its way already, and the others are the one after it."""
    first, second = bound(pair)
    for _ in range(100):
        first.notify()
    assert taken(second)
    assert [taken(second), taken(second)] in ([[False, False], [True, False]][: 1 + ON_XEN])


def test_the_end_that_binds_has_an_event_pending(pair: Pair) -> None:
    first = pair.granter.event_channels.alloc_unbound(MAPPER)
    second = pair.mapper.event_channels.bind_interdomain(GRANTER, first.port)
    assert readable(second)
    assert (taken(second), first.consume()) == (True, False)


@pytest.mark.beyond_xen("bound")
def test_notifying_an_end_that_nobody_has_bound_does_nothing(pair: Pair) -> None:
    first = pair.granter.event_channels.alloc_unbound(MAPPER)
    first.notify()
    assert not first.bound
    assert not readable(first)


@pytest.mark.beyond_xen("third_domain")
def test_a_port_belongs_to_one_domain(pair: Pair) -> None:
    first = pair.granter.event_channels.alloc_unbound(MAPPER)
    with pytest.raises(EventChannelError, match="not unbound and meant for domain 2") as caught:
        pair.another(OTHER).event_channels.bind_interdomain(GRANTER, first.port)
    assert caught.value.errno == errno.EINVAL
    pair.mapper.event_channels.bind_interdomain(GRANTER, first.port)


@pytest.mark.parametrize("port", [0, 1, 63, 64, 4096, 2**31, 2**32 - 1])
def test_a_port_that_is_not_there(pair: Pair, port: int) -> None:
    with pytest.raises(EventChannelError) as caught:
        pair.mapper.event_channels.bind_interdomain(GRANTER, Port(port))
    assert caught.value.errno == errno.EINVAL


def test_a_port_is_bound_once(pair: Pair) -> None:
    first, _ = bound(pair)
    with pytest.raises(EventChannelError):
        pair.mapper.event_channels.bind_interdomain(GRANTER, first.port)


@pytest.mark.beyond_xen("unknown_domain")
def test_a_domain_that_is_not_there(pair: Pair) -> None:
    with pytest.raises(GrantError, match="no domain 99"):
        pair.mapper.event_channels.alloc_unbound(Domid(99))
    with pytest.raises(GrantError, match="no domain 99"):
        pair.mapper.event_channels.bind_interdomain(Domid(99), Port(1))


@pytest.mark.beyond_xen("bound")
def test_closing_one_end_leaves_the_other_unbound_and_ready_for_the_same_domain(pair: Pair) -> None:
    first, second = bound(pair)
    second.close()
    assert not first.bound
    first.notify()
    again = pair.mapper.event_channels.bind_interdomain(GRANTER, first.port)
    again.consume()
    first.notify()
    assert (first.bound, taken(again)) == (True, True)


@pytest.mark.beyond_xen("third_domain")
def test_a_freed_port_is_for_the_same_domain_only(pair: Pair) -> None:
    first, second = bound(pair)
    second.close()
    with pytest.raises(EventChannelError):
        pair.another(OTHER).event_channels.bind_interdomain(GRANTER, first.port)


@pytest.mark.beyond_xen("bound")
def test_an_end_whose_process_left_can_be_bound_again(pair: Pair) -> None:
    first = pair.granter.event_channels.alloc_unbound(MAPPER)
    process = pair.another(MAPPER)
    process.event_channels.bind_interdomain(GRANTER, first.port)
    process.close()
    while first.bound:
        pass
    second = pair.mapper.event_channels.bind_interdomain(GRANTER, first.port)
    second.consume()
    first.notify()
    assert taken(second)


def test_closing_is_idempotent_and_events_after_it_are_nobodys(pair: Pair) -> None:
    first, second = bound(pair)
    first.close()
    first.close()
    first.notify()
    second.notify()
    assert not second.consume()


def test_an_old_end_does_not_close_the_port_of_its_successor(pair: Pair) -> None:
    first, second = bound(pair)
    second.close()
    again = pair.mapper.event_channels.bind_interdomain(GRANTER, first.port)
    second.close()
    taken(again)
    first.notify()
    assert taken(again)


def test_running_out_of_ports(tiny: Pair) -> None:
    for _ in range(3):
        tiny.granter.event_channels.alloc_unbound(MAPPER)
    with pytest.raises(EventChannelError, match="all of its 3 ports in use") as caught:
        tiny.granter.event_channels.alloc_unbound(MAPPER)
    assert caught.value.errno == errno.ENOSPC


def test_ports_are_given_back(tiny: Pair) -> None:
    for _ in range(20):
        first, second = bound(tiny)
        first.close()
        second.close()
    assert tiny.host.accounting()["ports"] == 0
