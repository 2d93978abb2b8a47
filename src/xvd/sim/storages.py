# SPDX-License-Identifier: Apache-2.0
"""The storages of one world by their names: the disk's own, and what it is copied to.

An image is ``sim:NAME``; with a tilde behind it is another way to the same storage, to which a disk
may be swapped.
"""

from collections.abc import Callable
from typing import Final

from xvd.engines.info import Channel
from xvd.sim.prng import Prng
from xvd.sim.storage import SimStorage

_SCHEME: Final = "sim:"
_OTHER_WAY: Final = "~"
_FILLED_WITH: Final = 0xDB
"""What a new target holds: no write's data, and no zeros."""

Maker = Callable[[Prng, int, int], SimStorage]
"""Its chance, its sectors, and the most that it will have -> a storage."""


def other_way(image: str) -> str:
    """Return the other image of the same storage."""
    return image.removesuffix(_OTHER_WAY) if image.endswith(_OTHER_WAY) else image + _OTHER_WAY


class Storages:
    """make: how each is made. sectors, sectors_max: of the disk, as of `SimStorage`."""

    def __init__(self, make: Maker, prng: Prng, sectors: int, sectors_max: int) -> None:
        self._make = make
        self._prng = prng
        self._sectors_max = sectors_max
        self._every: dict[str, SimStorage] = {}
        self._named = 0
        self.image = self.new_image()
        """The disk's."""
        self._add(self.image, sectors)

    def _add(self, image: str, sectors: int) -> SimStorage:
        made = self._make(self._prng.fork(), sectors, self._sectors_max)
        self._every[self.name_of(image)] = made
        return made

    def new_image(self) -> str:
        """Name one that nobody has had; it is made when it is opened."""
        self._named += 1
        return f"{_SCHEME}{self._named}"

    def of(self, image: str) -> SimStorage:
        """Return the storage of an image."""
        return self._every[self.name_of(image)]

    @staticmethod
    def name_of(image: str) -> str:
        """Return its name: its images differ, and it does not."""
        return image.removeprefix(_SCHEME).removesuffix(_OTHER_WAY)

    @property
    def disk(self) -> SimStorage:
        """The disk's storage."""
        return self.of(self.image)

    # ---- Of all of them ----

    @property
    def busy(self) -> list[SimStorage]:
        """Return those that hold operations which may end now."""
        return [one for one in self._every.values() if one.held]

    @property
    def hangs(self) -> bool:
        """Whether one of them ends nothing."""
        return any(one.hangs for one in self._every.values())

    def hang(self) -> None:
        """Let one of those that are in use end nothing, until `revive`."""
        used = [one for one in self._every.values() if one.is_used]
        if used:
            self._prng.choose(used).hang()

    def revive(self) -> None:
        """Let everything end again."""
        for one in self._every.values():
            one.revive()

    def leave(self, channel: Channel) -> None:
        """See `SimStorage.leave`."""
        for one in self._every.values():
            one.leave(channel)

    def backend_died(self) -> None:
        """See `SimStorage.backend_died`."""
        for one in self._every.values():
            one.backend_died()

    def power_lost(self) -> None:
        """See `SimStorage.power_lost`."""
        for one in self._every.values():
            one.power_lost()

    # ---- Whether they can be opened ----

    missing = False
    """Whether none can be opened now; who has one open has it."""

    def open(self, image: str) -> SimStorage:
        """Raise `EngineError` if it cannot be opened. A new one is as large as the disk's, and full
        of what is not on the disk."""
        if self.name_of(image) not in self._every:
            self._add(image, self.disk.sectors).fill(_FILLED_WITH)
        found = self.of(image)
        found.missing = self.missing
        found.open()
        return found
