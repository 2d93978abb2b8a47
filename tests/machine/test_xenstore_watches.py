# SPDX-License-Identifier: Apache-2.0
"""Watches of the store: exactly which events, to whom, in which order."""

from contextlib import AbstractContextManager

import pytest
from xs_rig import Caller, T, store_with_guests

from xvd.errors import XenstoreError
from xvd.machine.xs.messages import Message


def refused(code: str) -> AbstractContextManager[object]:
    return pytest.raises(XenstoreError, match=f"^{code}$")


def test_a_watch_fires_once_at_once_even_where_nothing_is() -> None:
    store, dom0 = store_with_guests()
    dom0.watch("/nothing", "t")
    assert (dom0.events(), store.counts.watches) == ([("/nothing", "t")], 1)


def test_the_first_event_comes_after_the_reply() -> None:
    store, _ = store_with_guests()
    kinds = []
    connection = store.connect(0, lambda message: kinds.append(message.type), lambda: None)
    connection.handle(Message(T.WATCH, 1, 0, b"/a\0t\0"))
    assert kinds == [T.WATCH, T.WATCH_EVENT]


def test_an_event_comes_before_the_reply_to_what_caused_it() -> None:
    store, _ = store_with_guests()
    kinds = []
    connection = store.connect(0, lambda message: kinds.append(message.type), lambda: None)
    connection.handle(Message(T.WATCH, 1, 0, b"/a\0t\0"))
    kinds.clear()
    connection.handle(Message(T.WRITE, 1, 0, b"/a\0value"))
    assert kinds == [T.WATCH_EVENT, T.WRITE]


@pytest.mark.parametrize(
    ("changed", "heard"),
    [("/a", True), ("/a/b", True), ("/ab", False), ("/", False), ("/b", False)],
)
def test_a_watch_hears_of_its_node_and_all_below(changed: str, heard: bool) -> None:
    _, dom0 = store_with_guests()
    dom0.watch("/a", "t")
    dom0.events()
    dom0.write(changed, b"")
    assert dom0.events() == ([(changed, "t")] if heard else [])


def test_a_watch_on_the_root_hears_everything() -> None:
    _, dom0 = store_with_guests()
    dom0.watch("/", "t")
    dom0.write("/a/b/c", b"")
    assert dom0.events() == [("/", "t"), ("/a/b/c", "t")]


def test_making_the_nodes_above_is_not_reported_separately() -> None:
    _, dom0 = store_with_guests()
    dom0.watch("/a", "t")
    dom0.events()
    dom0.mkdir("/a/b/c")
    assert dom0.events() == [("/a/b/c", "t")]


def test_mkdir_of_an_existing_node_is_no_change() -> None:
    _, dom0 = store_with_guests()
    dom0.mkdir("/a")
    dom0.watch("/a", "t")
    dom0.events()
    dom0.mkdir("/a")
    assert dom0.events() == []


def test_setting_permissions_is_a_change() -> None:
    _, dom0 = store_with_guests()
    dom0.mkdir("/a/b")
    dom0.watch("/a", "t")
    dom0.events()
    dom0.set_perms("/a/b", "r0")
    assert dom0.events() == [("/a/b", "t")]


def test_removing_above_a_watch_reports_the_watchs_own_path() -> None:
    _, dom0 = store_with_guests()
    dom0.write("/a/b/c/d", b"")
    for path in ("/a", "/a/b/c", "/a/b/c/d/e"):
        dom0.watch(path, "t")
    dom0.events()
    dom0.rm("/a/b")
    assert dom0.events() == [("/a/b/c", "t"), ("/a/b", "t")]


def test_a_relative_watch_has_relative_events() -> None:
    store, dom0 = store_with_guests(1)
    guest = Caller(store, 1)
    guest.watch("device", "t")
    dom0.write("/local/domain/1/device/vbd", b"")
    dom0.rm("/local/domain/1/device")
    assert guest.events() == [("device", "t"), ("device/vbd", "t"), ("device", "t")]


def test_dom0_too_has_a_directory_of_its_own() -> None:
    _, dom0 = store_with_guests()
    dom0.watch("backend", "t")
    dom0.write("/local/domain/0/backend/vbd", b"")
    assert dom0.events() == [("backend", "t"), ("backend/vbd", "t")]


def test_a_watch_is_unique_by_path_and_token() -> None:
    store, dom0 = store_with_guests()
    dom0.watch("/a", "t")
    dom0.watch("/a", "u")
    dom0.watch("/b", "t")
    with refused("EEXIST"):
        dom0.watch("/a", "t")
    assert store.counts.watches == 3


def test_unwatch_ends_one_watch() -> None:
    store, dom0 = store_with_guests()
    dom0.watch("/a", "t")
    dom0.watch("/a", "u")
    dom0.unwatch("/a", "t")
    dom0.events()
    dom0.write("/a", b"")
    assert (dom0.events(), store.counts.watches) == ([("/a", "u")], 1)
    with refused("ENOENT"):
        dom0.unwatch("/a", "t")


def test_two_watches_with_one_token_are_told_once() -> None:
    _, dom0 = store_with_guests()
    dom0.watch("/", "t")
    dom0.watch("/a", "t")
    dom0.events()
    dom0.write("/a", b"")
    assert dom0.events() == [("/a", "t")]


def test_a_transaction_is_reported_when_it_commits_and_not_before() -> None:
    _, dom0 = store_with_guests()
    dom0.watch("/", "t")
    dom0.events()
    tx = dom0.start()
    dom0.write("/a", b"", tx)
    dom0.write("/a", b"again", tx)
    dom0.write("/b", b"", tx)
    before = dom0.events()
    dom0.end(tx)
    assert (before, dom0.events()) == ([], [("/a", "t"), ("/b", "t")])


def test_an_aborted_or_conflicting_transaction_is_not_reported() -> None:
    _, dom0 = store_with_guests()
    aborted, conflicting = dom0.start(), dom0.start()
    dom0.write("/a", b"", aborted)
    dom0.write("/b", b"", conflicting)
    dom0.write("/b", b"")
    dom0.watch("/", "t")
    dom0.events()
    dom0.end(aborted, "F")
    with refused("EAGAIN"):
        dom0.end(conflicting)
    assert dom0.events() == []


def test_a_node_made_and_removed_in_one_transaction_is_not_reported() -> None:
    _, dom0 = store_with_guests()
    dom0.watch("/a", "t")
    dom0.events()
    tx = dom0.start()
    dom0.write("/a/b", b"", tx)
    dom0.rm("/a", tx)
    dom0.end(tx)
    assert dom0.events() == []


@pytest.mark.parametrize(("depth", "heard"), [("0", ["/a"]), ("1", ["/a", "/a/b"])])
def test_a_depth_limits_how_far_below_counts(depth: str, heard: list[str]) -> None:
    _, dom0 = store_with_guests()
    dom0.watch("/a", "t", depth)
    dom0.events()
    for path in ("/a", "/a/b", "/a/b/c"):
        dom0.write(path, b"")
    assert [path for path, _ in dom0.events()] == heard


def test_guests_hear_only_of_nodes_that_they_may_read() -> None:
    store, dom0 = store_with_guests(1, 2)
    guest = Caller(store, 1)
    dom0.write("/hidden", b"")
    dom0.write("/shown", b"")
    dom0.set_perms("/shown", "n0", "r1")
    guest.watch("/", "t")
    guest.events()
    dom0.write("/hidden", b"x")
    dom0.write("/shown", b"x")
    assert guest.events() == [("/shown", "t")]


def test_a_guest_that_loses_a_node_hears_that_it_did() -> None:
    store, dom0 = store_with_guests(1)
    guest = Caller(store, 1)
    dom0.write("/shown", b"")
    dom0.set_perms("/shown", "n0", "r1")
    guest.watch("/shown", "t")
    guest.events()
    dom0.set_perms("/shown", "n0")
    dom0.write("/shown", b"secret")
    assert guest.events() == [("/shown", "t")]


def test_introducing_and_releasing_domains_is_reported_to_dom0() -> None:
    store, dom0 = store_with_guests()
    dom0.watch("@introduceDomain", "in")
    dom0.watch("@releaseDomain", "out")
    dom0.events()
    dom0.introduce(1)
    introduced = dom0.events()
    dom0.introduce(1)
    again = dom0.events()
    dom0.release(1)
    assert (introduced, again) == ([("@introduceDomain", "in")], [])
    assert (dom0.events(), store.counts.domains) == ([("@releaseDomain", "out")], 1)


def test_with_depth_one_a_special_event_names_the_domain() -> None:
    _, dom0 = store_with_guests(7)
    dom0.watch("@releaseDomain", "any", "1")
    dom0.watch("@releaseDomain/7", "seven")
    dom0.watch("@releaseDomain/8", "eight")
    dom0.events()
    dom0.release(7)
    assert dom0.events() == [("@releaseDomain/7", "any"), ("@releaseDomain/7", "seven")]


def test_a_guest_hears_special_events_only_if_dom0_lets_it() -> None:
    store, dom0 = store_with_guests(1, 2, 3)
    guest = Caller(store, 1)
    guest.watch("@releaseDomain", "t")
    guest.events()
    dom0.release(2)
    before = guest.events()
    dom0.set_perms("@releaseDomain", "n0", "r1")
    dom0.release(3)
    assert (before, guest.events()) == ([], [("@releaseDomain", "t")])


def test_a_shutdown_is_reported_once_until_resumed() -> None:
    store, dom0 = store_with_guests(1)
    dom0.watch("@releaseDomain", "t")
    dom0.events()
    store.shut_down(1)
    store.shut_down(1)
    first = dom0.events()
    dom0.ask(T.RESUME, b"1\0")
    store.shut_down(1)
    assert (first, dom0.events()) == ([("@releaseDomain", "t")], [("@releaseDomain", "t")])
