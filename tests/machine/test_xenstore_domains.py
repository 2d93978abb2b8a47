# SPDX-License-Identifier: Apache-2.0
"""Permissions, quotas and the life of domains in the store."""

from contextlib import AbstractContextManager

import pytest
from xs_rig import Caller, T, store_with_guests

from xvd.errors import XenstoreError
from xvd.machine.emulated.xenstore import XenstoreStore
from xvd.machine.emulated.xenstore_domains import Quotas


def refused(code: str) -> AbstractContextManager[object]:
    return pytest.raises(XenstoreError, match=f"^{code}$")


def test_a_guest_owns_what_it_makes_and_the_rest_is_inherited() -> None:
    store, dom0 = store_with_guests(1, 2)
    dom0.set_perms("/local/domain/1", "n1", "r2")
    guest = Caller(store, 1)
    guest.write("data/x", b"")
    dom0.write("/local/domain/1/made-by-dom0", b"")
    assert dom0.get_perms("/local/domain/1/data/x") == ["n1", "r2"]
    assert dom0.get_perms("/local/domain/1/made-by-dom0") == ["n1", "r2"]


@pytest.mark.parametrize(
    ("letter", "may_read", "may_write"),
    [("n", False, False), ("r", True, False), ("w", False, True), ("b", True, True)],
)
@pytest.mark.parametrize("listed", [False, True], ids=["by-default", "by-entry"])
def test_what_a_letter_allows(letter: str, may_read: bool, may_write: bool, listed: bool) -> None:
    store, dom0 = store_with_guests(1)
    dom0.write("/x", b"value")
    dom0.set_perms("/x", *(["n0", f"{letter}1"] if listed else [f"{letter}0"]))
    guest = Caller(store, 1)
    acts = {may_read: [lambda: guest.read("/x")]}
    acts.setdefault(may_write, []).append(lambda: guest.write("/x", b""))
    for act in acts.get(True, []):
        act()
    for act in acts.get(False, []):
        with refused("EACCES"):
            act()


def test_a_guest_is_not_told_whether_a_hidden_node_exists() -> None:
    store, dom0 = store_with_guests(1)
    dom0.write("/hidden/x", b"")
    guest = Caller(store, 1)
    for path in ("/hidden/x", "/hidden/y"):
        with refused("EACCES"):
            guest.read(path)


def test_a_guest_cannot_give_its_nodes_away_or_do_dom0s_work() -> None:
    store, _ = store_with_guests(1, 2)
    guest = Caller(store, 1)
    guest.mkdir("x")
    with refused("EPERM"):
        guest.set_perms("x", "n2")
    for kind in (T.INTRODUCE, T.RELEASE, T.RESUME, T.SET_TARGET, T.CONTROL, T.IS_DOMAIN_INTRODUCED):
        with refused("EACCES"):
            guest.ask(kind, b"2\0002\0002\0")


def test_permissions_for_unknown_domains_are_kept_but_never_count() -> None:
    alive = {0, 1}
    store = XenstoreStore(domain_exists=alive.__contains__)
    dom0 = Caller(store)
    dom0.write("/x", b"")
    dom0.set_perms("/x", "n0", "r5")
    alive.add(5)
    dom0.introduce(5)
    with refused("EACCES"):
        Caller(store, 5).read("/x")
    assert dom0.get_perms("/x") == ["n0", "r5"]


def test_an_owner_that_does_not_exist_is_refused() -> None:
    store = XenstoreStore(domain_exists={0, 1}.__contains__)
    dom0 = Caller(store)
    with refused("ENOENT"):
        dom0.set_perms("/tool", "n5")


def test_a_new_domain_does_not_inherit_its_predecessors_rights() -> None:
    store, dom0 = store_with_guests(1)
    dom0.write("/x", b"")
    dom0.set_perms("/x", "n0", "b1")
    Caller(store, 1).read("/x")
    dom0.release(1)
    dom0.introduce(1)
    with refused("EACCES"):
        Caller(store, 1).read("/x")


def test_releasing_a_domain_drops_all_that_it_held() -> None:
    store, dom0 = store_with_guests(1, 2)
    guest = Caller(store, 1)
    guest.write("a/b", b"")
    guest.watch("a", "t")
    guest.start()
    dom0.release(1)
    counts = store.counts
    assert guest.dropped
    assert (counts.watches, counts.transactions, counts.connections) == (0, 0, 1)
    assert (counts.domains, counts.nodes, dom0.ls("/local/domain")) == (2, 6, ["2"])


def test_a_domain_that_dies_is_released() -> None:
    alive = {0, 1}
    store = XenstoreStore(domain_exists=alive.__contains__)
    dom0 = Caller(store)
    dom0.introduce(1)
    dom0.watch("@releaseDomain", "t")
    dom0.events()
    alive.discard(1)
    store.check_domains()
    assert (dom0.events(), store.counts.domains) == ([("@releaseDomain", "t")], 1)


def test_introducing_again_resets_the_domains_connections() -> None:
    store, dom0 = store_with_guests(1)
    guest = Caller(store, 1)
    guest.watch("a", "t")
    guest.start()
    dom0.introduce(1)
    counts = store.counts
    assert (counts.watches, counts.transactions, counts.connections) == (0, 0, 2)
    assert not guest.dropped


def test_what_cannot_be_released() -> None:
    _, dom0 = store_with_guests(1)
    with refused("EINVAL"):
        dom0.release(0)
    with refused("ENOENT"):
        dom0.release(2)


def test_a_device_model_has_its_targets_rights() -> None:
    store, dom0 = store_with_guests(1, 2)
    dom0.write("/local/domain/1/x", b"value")
    dom0.ask(T.SET_TARGET, b"2\0001\0")
    assert Caller(store, 2).read("/local/domain/1/x") == b"value"


def test_domain_questions() -> None:
    _, dom0 = store_with_guests(1)
    answers = [dom0.ask(T.IS_DOMAIN_INTRODUCED, f"{n}\0".encode()) for n in (0, 1, 2, 0x7FF0)]
    assert answers == [b"T\0", b"T\0", b"F\0", b"T\0"]
    assert dom0.ask(T.GET_DOMAIN_PATH, b"5\0") == b"/local/domain/5\0"


def test_the_quota_of_nodes_counts_what_a_domain_owns() -> None:
    store, dom0 = store_with_guests(1, quotas=Quotas(nodes=4))
    guest = Caller(store, 1)
    for name in "abc":
        guest.mkdir(name)
    with refused("ENOSPC"):
        guest.mkdir("d")
    guest.rm("a")
    guest.mkdir("d")
    assert dom0.ls("/local/domain/1") == ["b", "c", "d"]


def test_over_the_quota_nothing_is_half_made() -> None:
    store, dom0 = store_with_guests(1, quotas=Quotas(nodes=3))
    before = store.counts
    with refused("ENOSPC"):
        Caller(store, 1).write("a/b/c", b"")
    assert (store.counts.nodes, dom0.ls("/local/domain/1")) == (before.nodes, [])


def test_the_quota_of_nodes_binds_transactions_at_their_end() -> None:
    store, _ = store_with_guests(1, quotas=Quotas(nodes=4))
    guest = Caller(store, 1)
    tx = guest.start()
    for name in "abcd":
        guest.mkdir(name, tx)
    with refused("ENOSPC"):
        guest.end(tx)
    assert store.counts.nodes == 6


def test_the_quota_of_a_nodes_size_counts_value_permissions_and_children() -> None:
    store, _ = store_with_guests(1, quotas=Quotas(node_size=100))
    guest = Caller(store, 1)
    guest.write("x", bytes(67))
    with refused("ENOSPC"):
        guest.write("x", bytes(68))
    guest.mkdir("d")
    for name in range(33):
        guest.mkdir(f"d/{name % 10}")
    guest.mkdir("d/" + "n" * 46)
    with refused("ENOSPC"):
        guest.mkdir("d/one-more")


def test_quotas_of_watches_transactions_and_permissions() -> None:
    store, _ = store_with_guests(1, quotas=Quotas(watches=2, transactions=2, permissions=2))
    guest = Caller(store, 1)
    for index in range(3):
        guest.watch("x", f"{index}")
        guest.start()
    guest.mkdir("x")
    with refused("E2BIG"):
        guest.watch("x", "more")
    with refused("ENOSPC"):
        guest.start()
    with refused("ENOSPC"):
        guest.set_perms("x", "n1", "r0", "r0")


def test_a_transaction_that_touches_too_much_fails() -> None:
    store, _ = store_with_guests(1, quotas=Quotas(transaction_nodes=3))
    guest = Caller(store, 1)
    tx = guest.start()
    with refused("ENOSPC"):
        guest.write("a/b/c/d", b"", tx)
    with refused("ENOMEM"):
        guest.end(tx)


def test_dom0_is_bound_by_none_of_them() -> None:
    quotas = Quotas(nodes=1, watches=0, transactions=0, node_size=1, permissions=1)
    store, dom0 = store_with_guests(quotas=quotas)
    dom0.write("/a/b/c", bytes(4000))
    dom0.set_perms("/a", "n0", "r0", "r0")
    dom0.watch("/a", "t")
    dom0.watch("/b", "t")
    dom0.end(dom0.start())
    assert store.counts.nodes == 6


def test_control_shows_and_sets_quotas() -> None:
    store, dom0 = store_with_guests(1)
    dom0.ask(T.CONTROL, b"quota\0set\0nodes\0005\0")
    assert store.quotas.nodes == 5
    assert b"nodes            :        5 Nodes per domain\n" in dom0.ask(T.CONTROL, b"quota\0")
    assert dom0.ask(T.CONTROL, b"quota\0001\0").startswith(
        b"Domain 1:\nnodes           :        1\n"
    )
    assert dom0.ask(T.CONTROL, b"check\0") == b"OK\0"
    assert b"print\t<string>\n" in dom0.ask(T.CONTROL, b"help\0")


@pytest.mark.parametrize("command", [b"quota\0set\0nodes\0000\0", b"quota\0set\0x\0001\0", b"x\0"])
def test_control_refuses_what_it_does_not_know(command: bytes) -> None:
    _, dom0 = store_with_guests()
    with refused("EINVAL"):
        dom0.ask(T.CONTROL, command)
