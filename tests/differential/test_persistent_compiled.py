# SPDX-License-Identifier: Apache-2.0
"""The compiled table of persistent grants against a readable one: an ordered dict by last use."""

from collections import OrderedDict

import hypothesis.strategies as st
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from xvd.dataplane.back.persistent import PersistentGrants

CAPACITY = 12
INTERVAL = 100_000_000
IDLE = 3 * INTERVAL
GREFS = st.integers(0, 30) | st.sampled_from([2**31, 2**32 - 2, 2**32 - 1])


class Tables(RuleBasedStateMachine):
    """Two tables, the same entries."""

    def __init__(self) -> None:
        super().__init__()
        self.limit = 10
        self.book = PersistentGrants(CAPACITY, limit=self.limit, idle_ns=IDLE, secret=7)
        self.idle: OrderedDict[int, int] = OrderedDict()
        self.used: dict[int, int] = {}
        self.now = 0
        self.next_scan = 0
        self.overflowed = False

    @rule(gref=GREFS)
    def use(self, gref: int) -> None:
        kept = gref in self.used or gref in self.idle
        room = len(self.used) + len(self.idle) < min(self.limit, CAPACITY)
        assert self.book.use(gref) == (kept or room)
        self.overflowed |= not (kept or room)
        if kept or room:
            self.idle.pop(gref, None)
            self.used[gref] = self.used.get(gref, 0) + 1

    @precondition(lambda self: self.used)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        gref = data.draw(st.sampled_from(sorted(self.used)))
        self.book.release(gref, self.now)
        self.used[gref] -= 1
        if not self.used[gref]:
            del self.used[gref]
            self.idle[gref] = self.now

    @rule(limit=st.integers(0, CAPACITY + 3))
    def change_the_limit(self, limit: int) -> None:
        self.limit = limit
        self.book.set_limit(limit)

    @rule(by=st.integers(0, 2 * INTERVAL))
    def purge(self, by: int) -> None:
        self.now += by
        wanted = 0
        count = len(self.used) + len(self.idle)
        if self.now >= self.next_scan:
            self.next_scan = self.now + INTERVAL
            if count > self.limit or (self.overflowed and count == self.limit):
                wanted = min(count, self.limit * 5 // 100 + count - self.limit)
            self.overflowed = False
        purged = []
        for gref, last in list(self.idle.items()):
            if len(purged) < wanted or self.now - last >= IDLE:
                purged.append(gref)
                del self.idle[gref]
            else:
                break
        assert self.book.purge(self.now) == purged

    @invariant()
    def the_same_grants_are_in_both(self) -> None:
        assert len(self.book) == len(self.used) + len(self.idle)
        assert all(gref in self.book for gref in (*self.used, *self.idle))


TestTables = Tables.TestCase
TestTables.settings = settings(max_examples=300, stateful_step_count=60, deadline=None)


@given(st.lists(st.integers(0, 2**32 - 1), unique=True, max_size=200), st.integers(0, 2**32 - 1))
def test_any_references_are_found_and_struck_out_in_order(grefs: list[int], secret: int) -> None:
    book = PersistentGrants(max(1, len(grefs)), limit=len(grefs), secret=secret)
    for gref in grefs:
        assert book.use(gref)
    assert all(gref in book for gref in grefs)
    for gref in grefs:
        book.release(gref, 0)
    assert book.purge(0, everything=True) == grefs
    assert not any(gref in book for gref in grefs)
