# SPDX-License-Identifier: Apache-2.0
"""Limits at work: a disk's own, and those that a named group of disks shares."""

from collections.abc import Mapping, Sequence
from typing import Final

from xvd.backend.iotune import IoTune
from xvd.dataplane.back.throttle import Throttle
from xvd.errors import ConfigError

Throttles = tuple[Throttle | None, Throttle | None]
"""What a queue goes by: its disk's limits, and those of its disk's group."""


class Limited:
    """Limits that can be changed while queues go by them. For the event loop's thread."""

    def __init__(self) -> None:
        self.tune = IoTune()
        self._throttle = Throttle()

    def change(self, tune: IoTune) -> None:
        """Go by these; the queues are to be told."""
        if (tune.buckets, tune.size_iops_sec) != (self.tune.buckets, self.tune.size_iops_sec):
            self._throttle.configure(tune.buckets, request_bytes=tune.size_iops_sec)
        self.tune = tune

    @property
    def throttle(self) -> Throttle | None:
        """The data plane's part; None where there are no limits."""
        return self._throttle if self.tune.buckets else None


class Groups:
    """The groups of a daemon's disks, by name. A disk may name one before it has any limits.

    limits: ``NAME=VALUE`` for each group's name. Raises `ConfigError`.
    """

    def __init__(self, limits: dict[str, list[str]] | None = None) -> None:
        self._groups: Final[dict[str, Limited]] = {}
        for name, texts in (limits or {}).items():
            self.change(name, texts)

    def check(self, name: str) -> None:
        """Raise `ConfigError` where no disk may be in this group."""

    def find(self, name: str) -> Limited:
        """Return the group of this name."""
        return self._groups.setdefault(name, Limited())

    def change(self, name: str, texts: Sequence[str]) -> None:
        """Set each ``NAME=VALUE`` of a group's limits; its disks are to be told.

        Raises `ConfigError`, and then nothing is changed.
        """
        group = self._groups.get(name)
        tune = _changed(group.tune if group else IoTune(), name, texts)
        self.find(name).change(tune)

    def replace(self, limits: Mapping[str, Sequence[str]]) -> None:
        """Let these limits hold, and no others; the disks of all groups are to be told.

        Raises `ConfigError`, and then nothing is changed.
        """
        tunes = {name: _changed(IoTune(), name, texts) for name, texts in limits.items()}
        for name in self._groups.keys() | tunes.keys():
            self.find(name).change(tunes.get(name) or IoTune(group_name=name))

    def limits(self) -> dict[str, dict[str, int]]:
        """Return what is limited, by each group's name."""
        return {name: set_limits(group.tune) for name, group in sorted(self._groups.items())}


class NoGroups(Groups):
    """Of a process that has the disks of one guest only."""

    def check(self, name: str) -> None:
        """See `Groups.check`."""
        if name:
            raise ConfigError(
                f"{name}: disks of several guests share limits only where one process serves them "
                "all: xvd backend --isolation shared"
            )

    def change(self, name: str, _texts: Sequence[str]) -> None:
        """See `Groups.change`."""
        self.check(name)

    def replace(self, limits: Mapping[str, Sequence[str]]) -> None:
        """See `Groups.replace`."""
        for name in limits:
            self.check(name)


def _changed(tune: IoTune, group: str, texts: Sequence[str]) -> IoTune:
    """Return a group's limits, changed by ``NAME=VALUE``."""
    values = IoTune.parse([f"group_name={group}", *texts])
    if values["group_name"] != group or not group:
        raise ConfigError(f"a group's name is its own affair: set {group or 'it'} on a disk")
    return tune.changed(values)


def set_limits(tune: IoTune) -> dict[str, int]:
    """Return the limits that are not as they are where nobody set them, by name."""
    usual = IoTune()
    values = {name: getattr(tune, name) for name in IoTune.table() if name != "group_name"}
    return {name: value for name, value in values.items() if value != getattr(usual, name)}


class DiskLimits:
    """What limits one disk. For the event loop's thread."""

    def __init__(self, groups: Groups) -> None:
        self._groups = groups
        self._own = Limited()

    def apply(self, tune: IoTune) -> Throttles:
        """Go by these limits, and by those of the group that they name."""
        self._own.change(tune)
        group = self._groups.find(tune.group_name) if tune.group_name else None
        return self._own.throttle, group.throttle if group else None

    def figures(self) -> dict[str, int]:
        """Return the disk's own limits, by name."""
        return set_limits(self._own.tune)
