# SPDX-License-Identifier: Apache-2.0
"""Limits of requests and bytes a second, under the names of libvirt's ``<iotune>``.

https://libvirt.org/formatdomain.html, "Hard drives, floppy disks, CDROMs": a rate, a higher rate
for bursts (``_max``), and for how long a burst may have it (``_max_length``).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from xvd.blkif.operations import Kind
from xvd.dataplane.back.options import Bucket
from xvd.errors import ConfigError
from xvd.xenbus.settings import SettingsBase, name_setting, setting

_RATE_MAX: Final = 10**15
_SECOND_NS: Final = 10**9

SLACK_NS: Final = _SECOND_NS // 20
"""By how much a rate may be exceeded for a moment: a thread that wakes up late loses nothing."""

_WRITING: Final = (Kind.WRITE, Kind.FLUSH, Kind.DISCARD)
_KINDS: Final = {"read": (Kind.READ,), "write": _WRITING, "total": (Kind.READ, *_WRITING)}


def _rate(meaning: str) -> int:
    return setting(0, 0, _RATE_MAX, meaning, whose="libvirt", live=True)


def _burst(name: str) -> int:
    meaning = f"for a burst, instead of `{name}`; 0: no bursts"
    return setting(0, 0, _RATE_MAX, meaning, whose="libvirt", live=True)


def _length(name: str) -> int:
    meaning = f"seconds that a burst of `{name}` may last"
    return setting(1, 1, 1_000_000, meaning, whose="libvirt", live=True)


@dataclass(frozen=True, slots=True)
class IoTune(SettingsBase):
    """The limits of a disk or of a group of disks; 0: none. Raises `ConfigError`.

    A flush or a discard counts as a request that writes, of no bytes.
    """

    total_bytes_sec: int = _rate(
        "bytes a second, read and written; 0: no limit, as in all of these"
    )
    read_bytes_sec: int = _rate("bytes a second, read")
    write_bytes_sec: int = _rate("bytes a second, written")
    total_iops_sec: int = _rate("requests a second")
    read_iops_sec: int = _rate("requests a second that read")
    write_iops_sec: int = _rate("requests a second that write, flush or discard")
    total_bytes_sec_max: int = _burst("total_bytes_sec")
    read_bytes_sec_max: int = _burst("read_bytes_sec")
    write_bytes_sec_max: int = _burst("write_bytes_sec")
    total_iops_sec_max: int = _burst("total_iops_sec")
    read_iops_sec_max: int = _burst("read_iops_sec")
    write_iops_sec_max: int = _burst("write_iops_sec")
    total_bytes_sec_max_length: int = _length("total_bytes_sec_max")
    read_bytes_sec_max_length: int = _length("read_bytes_sec_max")
    write_bytes_sec_max_length: int = _length("write_bytes_sec_max")
    total_iops_sec_max_length: int = _length("total_iops_sec_max")
    read_iops_sec_max_length: int = _length("read_iops_sec_max")
    write_iops_sec_max_length: int = _length("write_iops_sec_max")
    size_iops_sec: int = setting(
        0, 0, 1 << 30, "bytes; a larger request counts as several; 0: always as one",
        whose="libvirt", live=True,
    )  # fmt: skip
    group_name: str = name_setting(
        "the group whose limits hold for the disk too, together with the group's other disks "
        "(`xvd group`)",
        whose="libvirt", live=True,
    )  # fmt: skip

    def __post_init__(self) -> None:
        SettingsBase.__post_init__(self)
        for name in _names():
            rate, burst = self._rates(name)
            if burst and burst <= rate:
                raise ConfigError(f"{name}_max is {burst}; a burst is more than {name}, {rate}")
            if burst and not rate:
                raise ConfigError(f"{name}_max is a burst of nothing; set {name} too")

    def _rates(self, name: str) -> tuple[int, int]:
        return getattr(self, name), getattr(self, f"{name}_max")

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """The limits as the data plane has them."""
        return tuple(bucket for name in _names() for bucket in self._buckets_of(name))

    def _buckets_of(self, name: str) -> Iterator[Bucket]:
        """One for the rate, and one for the burst's; what may be saved up lasts for one burst."""
        kinds, counts_bytes = _KINDS[name.partition("_")[0]], "_bytes_" in name
        rate, burst = self._rates(name)
        if not rate:
            return
        if not burst:
            yield Bucket(rate, kinds, counts_bytes, SLACK_NS)
            return
        length = getattr(self, f"{name}_max_length")
        saved_ns = (burst - rate) * length * _SECOND_NS // rate
        yield Bucket(rate, kinds, counts_bytes, max(saved_ns, SLACK_NS))
        yield Bucket(burst, kinds, counts_bytes, SLACK_NS)


def _names() -> Iterator[str]:
    """Each limit's, without those of its burst."""
    return (f"{which}_{what}_sec" for which in _KINDS for what in ("bytes", "iops"))
