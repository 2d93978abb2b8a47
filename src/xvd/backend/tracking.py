# SPDX-License-Identifier: Apache-2.0
"""What of a disk has changed since its last backup of each name: a map in the state directory.

A bit is set before the write it stands for is submitted, in memory that a successor maps again: a
backend that is killed loses none. It is not written out, so a map counts for one run of the host's
kernel. Where there is none, or one of other storage or of another size, everything has changed.
"""

import contextlib
import mmap
import re
from dataclasses import dataclass
from typing import Final

import msgspec

from xvd.backend.state import DiskState
from xvd.engines.interface import Engine
from xvd.engines.live.tracked import ChangeMap, Tracked, map_size
from xvd.errors import ConfigError
from xvd.files import boot_id
from xvd.xenbus.log import DeviceLog

_HEADER: Final = 4096
_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
MOST: Final = 8
"""Maps of one disk: a write marks in each."""


class _Header(msgspec.Struct, frozen=True):
    """What a map is of. image: where the last backup is. boot: of the kernel that has the map in
    its memory; on a medium there may be less."""

    identities: list[str]
    size: int
    image: str
    boot: str


@dataclass(frozen=True, slots=True)
class Last:
    """The last backup of a name: where it is, and what has changed since."""

    image: str
    changed: ChangeMap


class _Map:
    """One map and its memory."""

    def __init__(self, memory: mmap.mmap | bytearray, header: _Header) -> None:
        self._memory = memory
        self.header = header
        self._view = memoryview(memory)[_HEADER : _HEADER + map_size(header.size)]
        self.changed = ChangeMap(self._view, header.size)

    @classmethod
    def read(cls, memory: mmap.mmap | bytearray) -> "_Map":
        """One that is there already; `ConfigError` if it is none."""
        try:
            header = msgspec.json.decode(memory[:_HEADER].rstrip(b"\0"), type=_Header)
            return cls(memory, header)
        except (msgspec.MsgspecError, ValueError) as error:
            raise ConfigError(f"it is no map of changes: {error}") from None

    def note(self, header: _Header) -> None:
        """Write what it is of. Interrupted in the middle it can be read no more, and everything
        counts as changed."""
        text = msgspec.json.encode(header)
        if len(text) > _HEADER:
            raise ConfigError(f"the name of {header.image} is too long to be kept")
        self._memory[:_HEADER] = text.ljust(_HEADER, b"\0")
        self.header = header

    def close(self) -> None:
        """Let its memory go; nobody marks in it any more."""
        self.changed.close()
        self._view.release()
        if isinstance(self._memory, mmap.mmap):
            self._memory.close()


class Tracking:
    """The maps of one disk by their names. For the event loop's thread."""

    def __init__(self, kept: DiskState, log: DeviceLog) -> None:
        self._kept = kept
        self._log = log
        self._maps: dict[str, _Map] = {}

    @property
    def names(self) -> dict[str, dict[str, object]]:
        """Each name: where its last backup is, and how many bytes have changed since at most."""
        return {
            name: {"storage": one.header.image, "changed": one.changed.marked << 16}
            for name, one in self._maps.items()
        }

    def opened(self, engine: Engine) -> Engine:
        """The disk's storage is open: what a predecessor has left for it is taken up. The engine
        to go by."""
        for name, memory in self._kept.find_maps().items():
            try:
                found = _Map.read(memory)
                if engine.identity not in found.header.identities:
                    raise ConfigError("it is of other storage")
                if found.header.boot != boot_id():
                    raise ConfigError("this host was started anew")
                self._maps[name] = found
            except ConfigError as error:
                self._log.warning(
                    "the changes since backup %s are not known: %s",
                    name,
                    error,
                    event="changes-unknown",
                )
                self._kept.remove_map(name)
        return self._in_front_of(engine)

    def last(self, name: str, size: int) -> Last | None:
        """The last backup of this name; None if everything counts as changed. `ConfigError` for
        what can be no name, or one too many."""
        if not _NAME.fullmatch(name):
            raise ConfigError(f"{name!r} is no name of a backup: letters, digits, and -_.")
        if name not in self._maps:
            if len(self._maps) >= MOST:
                known = ", ".join(sorted(self._maps))
                raise ConfigError(f"there are {MOST} names of backups already: {known}")
            return None
        found = self._maps[name]
        if found.header.size != size:
            return None
        return Last(found.header.image, found.changed)

    def begin(self, name: str, engine: Engine, image: str) -> Engine:
        """A backup is whole, at rest: what changes from now on is new. The engine to go by.

        engine: the one before; the map of this name may not have been in front of it.
        """
        size = engine.info.size
        header = _Header([engine.identity], size, image, boot_id())
        found = self._maps.get(name)
        if found is not None and found.header.size == size:
            found.note(header)  # first: killed in between, more counts as changed than has
            found.changed.clear()
            return engine
        self._forget(name)
        memory = self._kept.new_map(name, _HEADER + map_size(size))
        one = self._maps[name] = _Map(memory, header)
        one.note(header)
        return self._in_front_of(_behind(engine))

    def moved(self, before: Engine, engine: Engine) -> Engine:
        """Other storage with the same content takes the place of `before`. The engine to go by."""
        for one in self._maps.values():
            identities = [before.identity, engine.identity]  # as long as it may be either
            one.note(msgspec.structs.replace(one.header, identities=identities))
        return self._in_front_of(engine)

    def without(self, name: str, engine: Engine) -> Engine:
        """Keep no map of this name any more; the engine to go by. `ConfigError` without one."""
        if name not in self._maps:
            known = ", ".join(sorted(self._maps)) or "none"
            raise ConfigError(f"there is no backup {name!r} to forget; there are: {known}")
        self._forget(name)
        return self._in_front_of(_behind(engine))

    def forget(self) -> None:
        """The disk has other content: everything counts as changed."""
        for name in list(self._maps):
            self._forget(name)

    def close(self) -> None:
        """Let the memory go; the files stay for a successor."""
        for one in self._maps.values():
            one.close()
        self._maps.clear()

    def _forget(self, name: str) -> None:
        self._maps.pop(name, None)  # a channel may still mark in it, so its memory is let be
        with contextlib.suppress(ConfigError, OSError):
            self._kept.remove_map(name)

    def _in_front_of(self, engine: Engine) -> Engine:
        maps = [one.changed for one in self._maps.values()]
        return Tracked(engine, maps) if maps else engine


def _behind(engine: Engine) -> Engine:
    return engine.lower if isinstance(engine, Tracked) else engine
