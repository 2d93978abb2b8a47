# SPDX-License-Identifier: Apache-2.0
"""Watches: which connection hears of which change.

The idea to read it by: watches are indexed by the path they stand on, so a change visits the
watches on its own path and on each ancestor and nowhere else, and what it costs does not grow with
the watches that other domains hold. Within a connection events come in the order in which its
watches were set, as with C xenstored.
"""

from collections.abc import Callable
from dataclasses import dataclass

from xvd.machine.emulated.xenstore_domains import Domain
from xvd.machine.xs.messages import parent_path


@dataclass(frozen=True, slots=True, eq=False)
class Watch:
    """One watch of one connection.

    `path` is absolute or special (``@...``); `prefix_size` characters of it are left out of what
    is reported, because the watch was asked for by a relative path. `depth` is how many levels
    below `path` count, None for all.
    """

    serial: int
    domain: Domain
    path: str
    token: str
    prefix_size: int
    depth: int | None
    send: Callable[[str, str], None]

    def fire(self, path: str) -> None:
        """Report a change at an absolute or special path."""
        self.send(path[self.prefix_size :], self.token)


class WatchIndex:
    """Every watch of the store, by path. One thread at a time."""

    def __init__(self) -> None:
        self._by_path: dict[str, dict[Watch, None]] = {}
        self._serial = 0

    def __len__(self) -> int:
        return sum(map(len, self._by_path.values()))

    def next_serial(self) -> int:
        """A number greater than that of every watch before."""
        self._serial += 1
        return self._serial

    def add(self, watch: Watch) -> None:
        """Let it hear of changes from now on."""
        self._by_path.setdefault(watch.path, {})[watch] = None

    def remove(self, watch: Watch) -> None:
        """Let it hear no more."""
        standing = self._by_path[watch.path]
        del standing[watch]
        if not standing:
            del self._by_path[watch.path]

    def matching(self, path: str, exact: bool) -> list[Watch]:
        """The watches that a change at `path` is for, in the order in which they were set.

        `exact` is for a node that goes because an ancestor was removed: watches above it hear of
        the ancestor, only those on the very path hear of it itself.
        """
        found = list(self._by_path.get(path, ()))
        levels = 0
        while not exact and path != "/":
            path = parent_path(path)
            levels += 1
            standing = self._by_path.get(path, ())
            found += [watch for watch in standing if watch.depth is None or watch.depth >= levels]
        return sorted(found, key=lambda watch: watch.serial)

    def matching_special(self, name: str, domid: int) -> list[tuple[Watch, str]]:
        """The watches on a special event and the path that each is to be told.

        A watch on ``@name`` hears ``@name``, or ``@name/<domid>`` if it was set with depth 1, and
        one on ``@name/<domid>`` hears of that domain alone (xenstore.txt).
        """
        detailed = f"{name}/{domid}"
        found = [
            (watch, detailed if watch.depth == 1 else name) for watch in self._by_path.get(name, ())
        ]
        found += [(watch, detailed) for watch in self._by_path.get(detailed, ())]
        return sorted(found, key=lambda pair: pair[0].serial)
