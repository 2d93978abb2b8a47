# SPDX-License-Identifier: Apache-2.0
"""Nodes and transactions of the store, counted after each step."""

from contextlib import AbstractContextManager

import pytest
from xs_rig import Caller, T, store_with_guests

from xvd.errors import XenstoreError


def refused(code: str) -> AbstractContextManager[object]:
    return pytest.raises(XenstoreError, match=f"^{code}$")


def test_a_new_store_has_the_three_nodes_of_xenstored() -> None:
    store, dom0 = store_with_guests()
    assert store.counts.nodes == 3
    assert (dom0.ls("/"), dom0.ls("/tool"), dom0.get_perms("/")) == (
        ["tool"],
        ["xenstored"],
        ["n0"],
    )


def test_writing_makes_the_nodes_above_and_nothing_else() -> None:
    store, dom0 = store_with_guests()
    dom0.write("/a/b/c", b"deep")
    assert store.counts.nodes == 6
    assert (dom0.read("/a/b/c"), dom0.read("/a/b"), dom0.ls("/a")) == (b"deep", b"", ["b"])


def test_writing_again_replaces_the_value_and_keeps_children() -> None:
    store, dom0 = store_with_guests()
    dom0.write("/a/b", b"1")
    dom0.write("/a", b"\0binary\xff")
    assert store.counts.nodes == 5
    assert (dom0.read("/a"), dom0.ls("/a")) == (b"\0binary\xff", ["b"])


def test_mkdir_of_an_existing_node_keeps_its_value() -> None:
    _, dom0 = store_with_guests()
    dom0.write("/a", b"kept")
    dom0.mkdir("/a")
    assert dom0.read("/a") == b"kept"


def test_children_are_listed_in_order_of_creation() -> None:
    _, dom0 = store_with_guests()
    for name in ("c", "a", "b"):
        dom0.mkdir(f"/x/{name}")
    dom0.rm("/x/a")
    dom0.mkdir("/x/a")
    assert dom0.ls("/x") == ["c", "b", "a"]


def test_removing_takes_all_below_and_its_name_above() -> None:
    store, dom0 = store_with_guests()
    dom0.write("/a/b/c/d", b"")
    dom0.write("/a/b/e", b"")
    dom0.rm("/a/b")
    assert store.counts.nodes == 4
    assert dom0.ls("/a") == []


def test_removing_what_is_not_there_is_fine_if_its_parent_is() -> None:
    _, dom0 = store_with_guests()
    dom0.rm("/a")
    with refused("ENOENT"):
        dom0.rm("/a/b")


def test_the_root_stays() -> None:
    _, dom0 = store_with_guests()
    with refused("EINVAL"):
        dom0.rm("/")


def test_a_very_deep_tree_is_removed() -> None:
    store, dom0 = store_with_guests()
    dom0.write("/" + "/".join("a" * 1000), b"")
    dom0.rm("/a")
    assert store.counts.nodes == 3


@pytest.mark.parametrize("path", ["", "//", "/a/", "/a b", "@a", "/" + "a" * 3000])
def test_impossible_paths_are_refused(path: str) -> None:
    _, dom0 = store_with_guests()
    with refused("EINVAL"):
        dom0.read(path)


def test_a_payload_without_its_nul_is_refused() -> None:
    _, dom0 = store_with_guests()
    for kind in (T.READ, T.DIRECTORY, T.RM, T.MKDIR, T.GET_PERMS, T.WRITE, T.WATCH, T.RELEASE):
        with refused("EINVAL"):
            dom0.ask(kind, b"/tool")


@pytest.mark.parametrize("kind", [T.WATCH_EVENT, T.ERROR, 20, T.GET_FEATURE, T.INVALID, 4711])
def test_what_is_no_request_is_refused(kind: int) -> None:
    _, dom0 = store_with_guests()
    with refused("ENOSYS"):
        dom0.ask(kind, b"\0")


def test_a_value_too_large_for_a_reply_cannot_be_stored_by_accident() -> None:
    _, dom0 = store_with_guests()
    for index in range(500):
        dom0.mkdir(f"/d/child-{index:04}")
    with refused("E2BIG"):
        dom0.ls("/d")


def test_a_large_directory_comes_in_parts() -> None:
    _, dom0 = store_with_guests()
    for index in range(500):
        dom0.mkdir(f"/d/child-{index:04}")
    names, parts = b"", []
    while not names.endswith(b"\0\0"):
        part = dom0.ask(T.DIRECTORY_PART, f"/d\0{len(names)}\0".encode())
        generation, _, more = part.partition(b"\0")
        parts.append((generation, len(part)))
        names += more
    assert len(names.split(b"\0")) == 502
    assert len({generation for generation, _ in parts}) == 1
    assert all(size <= 4096 for _, size in parts)


def test_the_generation_tells_that_a_directory_changed() -> None:
    _, dom0 = store_with_guests()
    before = dom0.ask(T.DIRECTORY_PART, b"/tool\0000\0")
    dom0.mkdir("/tool/x")
    after = dom0.ask(T.DIRECTORY_PART, b"/tool\0000\0")
    assert before.partition(b"\0")[0] != after.partition(b"\0")[0]


def test_a_transaction_is_seen_by_nobody_until_it_commits() -> None:
    store, dom0 = store_with_guests()
    tx = dom0.start()
    dom0.write("/a/b", b"new", tx)
    assert (dom0.read("/a/b", tx), store.counts.nodes) == (b"new", 3)
    dom0.end(tx)
    assert (dom0.read("/a/b"), store.counts.nodes, store.counts.transactions) == (b"new", 5, 0)


def test_an_aborted_transaction_leaves_nothing() -> None:
    store, dom0 = store_with_guests()
    tx = dom0.start()
    dom0.write("/a/b", b"new", tx)
    dom0.rm("/tool", tx)
    dom0.end(tx, "F")
    assert (store.counts.nodes, store.counts.transactions) == (3, 0)


def test_a_conflict_on_a_node_that_was_read_is_told() -> None:
    _, dom0 = store_with_guests()
    dom0.write("/a", b"1")
    tx = dom0.start()
    dom0.read("/a", tx)
    dom0.write("/a", b"2")
    dom0.write("/b", b"", tx)
    with refused("EAGAIN"):
        dom0.end(tx)
    with refused("ENOENT"):
        dom0.read("/b")


def test_a_conflict_on_a_node_that_was_missing_is_told() -> None:
    _, dom0 = store_with_guests()
    tx = dom0.start()
    with refused("ENOENT"):
        dom0.read("/a", tx)
    dom0.write("/a", b"")
    with refused("EAGAIN"):
        dom0.end(tx)


def test_changes_elsewhere_are_no_conflict() -> None:
    _, dom0 = store_with_guests()
    dom0.mkdir("/x")
    dom0.mkdir("/y")
    tx = dom0.start()
    dom0.write("/x/1", b"", tx)
    dom0.write("/y/1", b"")
    dom0.end(tx)
    assert (dom0.ls("/x"), dom0.ls("/y")) == (["1"], ["1"])


def test_of_two_transactions_on_one_node_the_second_repeats() -> None:
    _, dom0 = store_with_guests()
    dom0.write("/n", b"0")
    first, second = dom0.start(), dom0.start()
    for tx in (first, second):
        dom0.write("/n", str(int(dom0.read("/n", tx)) + 1).encode(), tx)
    dom0.end(first)
    with refused("EAGAIN"):
        dom0.end(second)
    assert dom0.read("/n") == b"1"


def test_transactions_belong_to_their_connection() -> None:
    store, dom0 = store_with_guests()
    other = Caller(store)
    tx = dom0.start()
    with refused("ENOENT"):
        other.read("/tool", tx)


def test_transactions_do_not_nest() -> None:
    _, dom0 = store_with_guests()
    tx = dom0.start()
    with refused("EBUSY"):
        dom0.ask(T.TRANSACTION_START, b"\0", tx)


def test_a_closed_connection_leaves_nothing_behind() -> None:
    store, _ = store_with_guests()
    other = Caller(store)
    other.write("/a", b"", other.start())
    other.watch("/", "token")
    before = store.counts
    other.connection.close()
    assert (before.watches, before.transactions, before.connections) == (1, 1, 2)
    after = store.counts
    assert (after.watches, after.transactions, after.connections, after.nodes) == (0, 0, 1, 3)


def test_reset_watches_ends_watches_and_transactions_of_the_caller_only() -> None:
    store, dom0 = store_with_guests()
    other = Caller(store)
    for caller in (dom0, other):
        caller.start()
        caller.watch("/", "token")
    dom0.ask(T.RESET_WATCHES, b"\0")
    assert (store.counts.watches, store.counts.transactions) == (1, 1)
