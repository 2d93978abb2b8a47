# SPDX-License-Identifier: Apache-2.0
"""What granting, mapping and copying mean on every machine.

Statuses are Xen's GNTST values; where the hypervisor has two for the same mistake (general error,
bad reference), either will do.
"""

import pytest
from rig_machine import GRANTER, MAPPER, OTHER, Pair

from xvd.errors import GrantError
from xvd.types import PAGE_SIZE, Domid, Gref

GENERAL_ERROR, BAD_DOMAIN, BAD_GREF, NO_SPACE = -1, -2, -3, -13
REFUSED = (GENERAL_ERROR, BAD_GREF, -8)


def test_what_one_end_writes_the_other_sees(pair: Pair) -> None:
    pages = pair.granter.grants.share(MAPPER, 1)
    mapping = pair.mapper.grants.foreign(GRANTER).map(pages.grefs)
    pages.view[:5] = b"hello"
    mapping.view[5:10] = b"world"
    assert (bytes(mapping.view[:10]), bytes(pages.view[:10])) == (b"helloworld",) * 2
    mapping.close()


def test_pages_are_zero_when_handed_out_again(pair: Pair) -> None:
    """XSA-403: what a former use left behind must not reach the next peer."""
    for _ in range(3):
        pages = pair.granter.grants.share(MAPPER, 4)
        clean = not any(pages.view)
        pages.view[:] = b"x" * len(pages.view)
        pages.close()
        assert clean


def test_a_mapping_is_in_one_piece_and_in_the_order_of_its_references(pair: Pair) -> None:
    pages = pair.granter.grants.share(MAPPER, 4)
    for page in range(4):
        pages.view[page * pages.stride] = page
    order = [3, 0, 2, 1]
    mapping = pair.mapper.grants.foreign(GRANTER).map([pages.grefs[page] for page in order])
    assert [mapping.view[page * mapping.stride] for page in range(4)] == order
    mapping.close()


@pytest.mark.beyond_xen("revoke")
def test_the_same_reference_may_be_mapped_twice(pair: Pair) -> None:
    pages = pair.granter.grants.share(MAPPER, 1)
    grants = pair.mapper.grants.foreign(GRANTER)
    both = grants.map([pages.grefs[0]] * 2)
    again = grants.map(pages.grefs)
    both.view[both.stride] = 42
    assert (both.view[0], again.view[0]) == (42, 42)
    both.close()
    assert not pages.revoke(0)
    again.close()
    assert pages.revoke(0)


def test_references_are_not_the_reserved_ones(pair: Pair) -> None:
    pages = pair.granter.grants.share(MAPPER, 4)
    assert min(pages.grefs) >= 8
    assert len(set(pages.grefs)) == 4


@pytest.mark.beyond_xen("third_domain")
def test_a_grant_is_for_one_domain_only(pair: Pair) -> None:
    pages = pair.granter.grants.share(MAPPER, 1)
    stranger = pair.another(OTHER).grants.foreign(GRANTER)
    with pytest.raises(GrantError, match=f"map grant {pages.grefs[0]} of domain 1") as caught:
        stranger.map(pages.grefs)
    assert caught.value.status in REFUSED


@pytest.mark.parametrize("gref", [0, 1, 7, 1000, 2047, 2048, 2**31, 2**32 - 1])
def test_a_reference_that_was_never_granted(pair: Pair, gref: int) -> None:
    grants = pair.mapper.grants.foreign(GRANTER)
    with pytest.raises(GrantError) as caught:
        grants.map([Gref(gref)])
    assert caught.value.status in REFUSED
    with pytest.raises(GrantError) as caught:
        grants.read(Gref(gref), 0, 1)
    assert caught.value.status in REFUSED


@pytest.mark.beyond_xen("unknown_domain")
def test_a_domain_that_is_not_there(pair: Pair) -> None:
    with pytest.raises(GrantError, match="no domain 99") as caught:
        pair.mapper.grants.foreign(Domid(99))
    assert caught.value.status == BAD_DOMAIN
    with pytest.raises(GrantError, match="no domain 99"):
        pair.mapper.grants.share(Domid(99), 1)


@pytest.mark.beyond_xen("readonly_grants")
def test_a_read_only_grant_may_be_read_and_not_written(pair: Pair) -> None:
    pages = pair.granter.grants.share(MAPPER, 1)
    pages.grant(0, readonly=True)
    grants = pair.mapper.grants.foreign(GRANTER)
    with pytest.raises(GrantError) as caught:
        grants.map(pages.grefs)
    assert caught.value.status in REFUSED
    with pytest.raises(GrantError) as caught:
        grants.write(pages.grefs[0], 0, b"x")
    assert caught.value.status in REFUSED
    mapping = grants.map(pages.grefs, writable=False)
    assert mapping.view.readonly
    assert grants.read(pages.grefs[0], 0, 4) == bytes(4)
    mapping.close()


@pytest.mark.beyond_xen("revoke")
def test_a_page_in_use_is_not_revoked_and_nothing_changes(pair: Pair) -> None:
    pages = pair.granter.grants.share(MAPPER, 2)
    mapping = pair.mapper.grants.foreign(GRANTER).map(pages.grefs[:1])
    assert (pages.revoke(0), pages.revoke(1)) == (False, True)
    mapping.view[0] = 7
    assert pages.view[0] == 7
    mapping.close()
    assert pages.revoke(0)


@pytest.mark.beyond_xen("revoke")
def test_a_revoked_page_cannot_be_mapped_until_granted_again(pair: Pair) -> None:
    pages = pair.granter.grants.share(MAPPER, 1)
    grants = pair.mapper.grants.foreign(GRANTER)
    pages.revoke(0)
    with pytest.raises(GrantError):
        grants.map(pages.grefs)
    pages.grant(0)
    grants.map(pages.grefs).close()


@pytest.mark.beyond_xen("revoke")
def test_revoking_twice_is_harmless(pair: Pair) -> None:
    pages = pair.granter.grants.share(MAPPER, 1)
    assert [pages.revoke(0), pages.revoke(0)] == [True, True]


@pytest.mark.beyond_xen("revoke")
@pytest.mark.parametrize("position", range(4))
def test_a_set_is_mapped_as_a_whole_or_not_at_all(pair: Pair, position: int) -> None:
    pages = pair.granter.grants.share(MAPPER, 4)
    grefs = list(pages.grefs)
    grefs[position] = Gref(2000)
    with pytest.raises(GrantError):
        pair.mapper.grants.foreign(GRANTER).map(grefs)
    assert all(pages.revoke(page) for page in range(4))


@pytest.mark.beyond_xen("inject", "revoke")
@pytest.mark.parametrize("status", [GENERAL_ERROR, -7, NO_SPACE])
@pytest.mark.parametrize("position", range(4))
def test_an_injected_failure_leaves_nothing_mapped(pair: Pair, position: int, status: int) -> None:
    """XSA-361, 362, 365: the good ones of a batch in which one fails."""
    pages = pair.granter.grants.share(MAPPER, 4)
    grants = pair.mapper.grants.foreign(GRANTER)
    grants.inject([0] * position + [status])
    with pytest.raises(GrantError) as caught:
        grants.map(pages.grefs)
    assert caught.value.status == status
    assert all(pages.revoke(page) for page in range(4))


def test_nothing_to_map(pair: Pair) -> None:
    with pytest.raises(GrantError, match="no grant references"):
        pair.mapper.grants.foreign(GRANTER).map([])


def test_bytes_are_copied_both_ways(pair: Pair) -> None:
    pages = pair.granter.grants.share(MAPPER, 1)
    grants = pair.mapper.grants.foreign(GRANTER)
    grants.write(pages.grefs[0], 4090, b"123456")
    assert grants.read(pages.grefs[0], 4088, 8) == b"\0\000123456"
    assert bytes(pages.view[4090:]) == b"123456"


@pytest.mark.beyond_xen("revoke")
def test_a_copy_does_not_hold_on_to_the_page(pair: Pair) -> None:
    pages = pair.granter.grants.share(MAPPER, 1)
    pair.mapper.grants.foreign(GRANTER).read(pages.grefs[0], 0, 4096)
    assert pages.revoke(0)


@pytest.mark.parametrize(
    ("offset", "size"), [(0, 4097), (1, 4096), (4096, 1), (4095, 2), (2**32 - 1, 2), (0, 2**32 - 1)]
)
def test_a_copy_does_not_cross_its_page(pair: Pair, offset: int, size: int) -> None:
    pages = pair.granter.grants.share(MAPPER, 2)
    with pytest.raises(GrantError) as caught:
        pair.mapper.grants.foreign(GRANTER).read(pages.grefs[0], offset, size)
    assert caught.value.status == -10


@pytest.mark.beyond_xen("inject")
def test_an_injected_failure_of_a_copy_is_that_copys_alone(pair: Pair) -> None:
    pages = pair.granter.grants.share(MAPPER, 1)
    grants = pair.mapper.grants.foreign(GRANTER)
    grants.inject([GENERAL_ERROR])
    with pytest.raises(GrantError) as caught:
        grants.read(pages.grefs[0], 0, 8)
    assert caught.value.status == GENERAL_ERROR
    assert grants.read(pages.grefs[0], 0, 8) == bytes(8)


@pytest.mark.beyond_xen("accounting")
def test_pages_given_up_while_mapped_are_free_when_they_are_not(pair: Pair) -> None:
    pages = pair.granter.grants.share(MAPPER, 3)
    mapping = pair.mapper.grants.foreign(GRANTER).map(pages.grefs)
    pages.close()
    assert pair.host.accounting()["pages"] == 3 * pages.stride // PAGE_SIZE
    mapping.view[0] = 1  # still the same page, and nobody else's
    assert not any(pair.granter.grants.share(MAPPER, 3).view)
    mapping.close()
    assert pair.host.accounting()["pages"] == 3 * pages.stride // PAGE_SIZE  # the second's


def test_pages_of_a_granter_that_left_are_free_when_the_peer_lets_go(pair: Pair) -> None:
    granter = pair.another(GRANTER)
    pages = granter.grants.share(MAPPER, 2)
    mapping = pair.mapper.grants.foreign(GRANTER).map(pages.grefs)
    granter.close()
    mapping.view[0] = 1
    mapping.close()


@pytest.mark.beyond_xen("accounting", "revoke")
def test_a_mapping_closed_after_its_machine_disturbs_nobody(pair: Pair) -> None:
    """Its track entry was given back with the machine, and may be somebody else's by now."""
    pages = pair.granter.grants.share(MAPPER, 2)
    first, second = pair.another(MAPPER), pair.another(MAPPER)
    orphan = first.grants.foreign(GRANTER).map(pages.grefs)
    first.close()
    while pair.host.accounting()["mappings"]:
        pass
    kept = second.grants.foreign(GRANTER).map(pages.grefs)
    orphan.close()
    assert [pages.revoke(0), pages.revoke(1)] == [False, False]
    kept.close()


@pytest.mark.beyond_xen("accounting")
def test_closing_is_idempotent(pair: Pair) -> None:
    pages = pair.granter.grants.share(MAPPER, 1)
    grants = pair.mapper.grants.foreign(GRANTER)
    mapping = grants.map(pages.grefs)
    for _ in range(2):
        mapping.close()
        grants.close()
        pages.close()
    assert pair.host.accounting()["pages"] == 0


def test_what_is_closed_cannot_be_used(pair: Pair) -> None:
    pages = pair.granter.grants.share(MAPPER, 1)
    grants = pair.mapper.grants.foreign(GRANTER)
    mapping = grants.map(pages.grefs)
    mapping.close()
    with pytest.raises(ValueError, match="unmapped"):
        mapping.view  # noqa: B018
    grants.close()
    with pytest.raises(GrantError, match="closed"):
        grants.read(pages.grefs[0], 0, 1)
    with pytest.raises(GrantError, match="closed"):
        grants.map(pages.grefs)


@pytest.mark.beyond_xen("revoke")
def test_page_numbers_have_bounds(pair: Pair) -> None:
    pages = pair.granter.grants.share(MAPPER, 2)
    with pytest.raises(IndexError):
        pages.grant(2)
    with pytest.raises(IndexError):
        pages.revoke(2)


@pytest.mark.parametrize("count", [0, -1, -(2**40)])
def test_no_pages_at_all_cannot_be_shared(pair: Pair, count: int) -> None:
    with pytest.raises(GrantError, match="at least one page"):
        pair.granter.grants.share(MAPPER, count)


def test_running_out_of_references(tiny: Pair) -> None:
    with pytest.raises(GrantError, match="16 grant references left, 17 are needed") as caught:
        tiny.granter.grants.share(MAPPER, 17)
    assert caught.value.status == NO_SPACE


def test_running_out_of_pages(tiny: Pair) -> None:
    held = tiny.granter.grants.share(MAPPER, 10)
    with pytest.raises(GrantError, match="no 6 contiguous pages left of 16") as caught:
        tiny.granter.grants.share(MAPPER, 6)
    assert caught.value.status == NO_SPACE
    held.close()
    tiny.granter.grants.share(MAPPER, 15)


def test_running_out_of_map_tracks(tiny: Pair) -> None:
    pages = tiny.granter.grants.share(MAPPER, 6)
    grants = tiny.mapper.grants.foreign(GRANTER)
    with pytest.raises(GrantError, match="out of space") as caught:
        grants.map(pages.grefs)
    assert caught.value.status == NO_SPACE
    grants.map(pages.grefs[:5]).close()


def test_running_out_of_tracks_for_another_peer(tiny: Pair) -> None:
    for _ in range(6):
        tiny.mapper.grants.foreign(GRANTER)
    with pytest.raises(GrantError, match="all 6 map-track entries") as caught:
        tiny.mapper.grants.foreign(GRANTER)
    assert caught.value.status == NO_SPACE


@pytest.mark.beyond_xen("grant_table")
def test_the_entry_says_who_reads_and_writes(pair: Pair) -> None:
    """Xen's v1 flags: permit 1, readonly 4, reading 8, writing 16."""
    pages = pair.granter.grants.share(MAPPER, 1)
    state = pair.granter.state(GRANTER)
    grants = pair.mapper.grants.foreign(GRANTER)
    seen = [state.entry(pages.grefs[0])[0]]
    reading = grants.map(pages.grefs, writable=False)
    seen.append(state.entry(pages.grefs[0])[0])
    writing = grants.map(pages.grefs)
    seen.append(state.entry(pages.grefs[0])[0])
    writing.close()
    seen.append(state.entry(pages.grefs[0])[0])
    reading.close()
    seen.append(state.entry(pages.grefs[0])[0])
    assert seen == [1, 1 | 8, 1 | 8 | 16, 1 | 8, 1]
