# SPDX-License-Identifier: Apache-2.0
"""Maps of what was changed, and what is copied of them while others write."""

from collections.abc import Callable

import pytest

from xvd.engines.changes import GRANULE, ChangeMap, map_size
from xvd.engines.live.mirror import Mirror
from xvd.engines.live.tracked import Tracked
from xvd.engines.memory import MemoryEngine
from xvd.engines.mirror import Twins
from xvd.errors import EngineError

SIZE = 100 * GRANULE + 512


def a_map(size: int = SIZE) -> ChangeMap:
    return ChangeMap(bytearray(map_size(size)), size)


def marked(changed: ChangeMap, size: int = SIZE) -> list[int]:
    return [at for at in range(0, size, GRANULE) if changed.is_marked(at)]


@pytest.mark.parametrize(
    ("offset", "length", "first", "count"),
    [
        (0, 1, 0, 1),
        (GRANULE - 1, 2, 0, 2),
        (GRANULE, GRANULE, 1, 1),
        (3 * GRANULE + 7, 0, 3, 0),
        (GRANULE, 90 * GRANULE, 1, 90),
        (100 * GRANULE, 512, 100, 1),
        (100 * GRANULE, 1 << 40, 100, 1),
        (1 << 50, 1, 0, 0),
    ],
)
def test_a_range_marks_what_it_has_part_in(
    offset: int, length: int, first: int, count: int
) -> None:
    changed = a_map()

    changed.mark(offset, length)

    assert marked(changed) == [n * GRANULE for n in range(first, first + count)]
    assert changed.marked == count


def test_all_of_a_map_is_what_the_disk_has() -> None:
    changed = a_map()

    changed.mark_all()

    assert changed.marked == 101


def test_one_map_takes_over_what_another_has() -> None:
    one, other = a_map(), a_map()
    one.mark(0, 1)
    other.mark(70 * GRANULE, 1)

    one.add(other)

    assert marked(one) == [0, 70 * GRANULE]
    with pytest.raises(ValueError, match="different sizes"):
        one.add(a_map(GRANULE))


def test_a_map_has_the_memory_that_it_needs() -> None:
    with pytest.raises(ValueError, match="has 16, not 8"):
        ChangeMap(bytearray(8), SIZE)


def test_what_is_written_and_discarded_is_marked_in_every_map() -> None:
    maps = [a_map(1 << 20), a_map(1 << 20)]
    engine = Tracked(MemoryEngine(1 << 20), maps)

    engine.write(memoryview(bytearray(512)), GRANULE)
    engine.discard(4 * GRANULE, 2 * GRANULE)
    engine.read(memoryview(bytearray(512)), 8 * GRANULE)
    engine.flush()

    for one in maps:
        assert marked(one, 1 << 20) == [GRANULE, 4 * GRANULE, 5 * GRANULE]


# ---- What is copied, and when ------------------------------------------------------------------


def test_runs_are_taken_one_after_the_other_and_each_once() -> None:
    todo = a_map()
    todo.mark(0, 3 * GRANULE)
    todo.mark(100 * GRANULE, 1)
    twins = Twins(todo, SIZE)
    taken = []
    while (run := twins.take(2)) is not None:
        taken.append(run)
        twins.copied()

    assert taken == [(0, 2 * GRANULE), (2 * GRANULE, GRANULE), (100 * GRANULE, 512)]
    assert todo.marked == 0


def test_what_somebody_writes_to_is_copied_when_that_is_over() -> None:
    todo = a_map()
    todo.mark(0, 1)
    twins = Twins(todo, SIZE)
    twins.enter(0, 512)

    assert twins.take(16) is None
    twins.leave(0, 512)
    assert twins.take(16) == (0, GRANULE)


def test_what_is_written_to_while_it_is_copied_is_copied_again() -> None:
    todo = a_map()
    todo.mark(0, 1)
    twins = Twins(todo, SIZE)

    assert twins.take(16) == (0, GRANULE)
    twins.enter(0, 512)
    twins.leave(0, 512)
    twins.copied()
    assert twins.take(16) == (0, GRANULE)


def test_what_could_not_be_copied_is_still_to_be() -> None:
    todo = a_map()
    todo.mark(0, 2 * GRANULE)
    twins = Twins(todo, SIZE)
    twins.take(16)

    twins.put_back()

    assert twins.take(16) == (0, 2 * GRANULE)


def test_a_discard_of_a_large_disk_is_counted_once_in_each_bucket() -> None:
    size = 10000 * GRANULE
    twins = Twins(a_map(size), size)

    twins.enter(0, size)
    assert twins.take(16) is None
    twins.leave(0, size)

    assert twins.take(16) == (0, 16 * GRANULE)


def test_a_mirror_copies_what_there_is_and_clears_what_is_zero() -> None:
    disk, target = MemoryEngine(SIZE), MemoryEngine(SIZE)
    disk.view[:] = bytes(50 * GRANULE) + b"d" * (SIZE - 50 * GRANULE)
    target.view[:] = b"t" * SIZE
    mirror = Mirror(disk, target)

    mirror.write(memoryview(b"w" * 512), GRANULE)
    mirror.finish()

    assert bytes(target.view) == bytes(disk.view)
    assert mirror.left == 0


class Full(MemoryEngine):
    """Takes no writes."""

    def write(self, buffer: memoryview, offset: int) -> None:
        raise EngineError(28, "there is no room")


def test_a_mirror_whose_target_has_failed_is_none_any_more() -> None:
    disk = MemoryEngine(SIZE)
    disk.view[:] = b"d" * SIZE
    mirror = Mirror(disk, Full(SIZE))

    with pytest.raises(EngineError, match="no room"):
        mirror.copy(SIZE)
    with pytest.raises(EngineError, match="write to the target failed"):
        mirror.finish()
    mirror.write(memoryview(b"w" * 512), 0)

    assert bytes(disk.view[:513]) == b"w" * 512 + b"d"


class Slow(MemoryEngine):
    """Does something before each write."""

    meanwhile: Callable[[], object]

    def write(self, buffer: memoryview, offset: int) -> None:
        self.meanwhile()
        super().write(buffer, offset)


def test_one_copies_at_a_time_whoever_still_waits_for_it() -> None:
    lower, target = MemoryEngine(3 * GRANULE), Slow(3 * GRANULE)
    lower.view[:] = b"d" * (3 * GRANULE)
    mirror = Mirror(lower, target)
    found: list[object] = []

    def meanwhile() -> None:
        found.append(mirror.copies)
        found.append(mirror.copy(GRANULE))
        with pytest.raises(EngineError, match="still being copied"):
            mirror.finish()

    target.meanwhile = meanwhile

    mirror.finish()

    assert found == [True, 0]
    assert (mirror.copies, target.view == lower.view) == (False, True)


def test_what_nobody_waits_for_is_stopped_and_can_be_begun_again() -> None:
    lower, target = MemoryEngine(40 * GRANULE), Slow(40 * GRANULE)
    lower.view[:] = b"d" * (40 * GRANULE)
    mirror = Mirror(lower, target)
    target.meanwhile = mirror.stop

    with pytest.raises(EngineError, match="took too long"):
        mirror.finish()
    left = mirror.left
    target.meanwhile = lambda: None
    mirror.finish()

    assert left == 24 * GRANULE
    assert target.view == lower.view


def test_all_of_a_disk_has_changed_that_had_another_size_meanwhile() -> None:
    class Resized(MemoryEngine):
        size = SIZE

        def measure(self) -> int:
            return self.size

        def resize(self, size: int) -> None:
            self.size = size

    changed = a_map()
    storage = Resized(SIZE)
    tracked = Tracked(storage, [changed])

    tracked.measure()
    before = changed.marked
    tracked.resize(SIZE // 2)
    tracked.resize(SIZE)
    by_us = changed.marked
    changed.clear()
    storage.size = SIZE // 2
    tracked.measure()

    assert (before, by_us, changed.marked) == (0, 101, 101)
