# SPDX-License-Identifier: Apache-2.0
"""The Prometheus metrics: one table, each row with a metric's name, help, labels and origin.

Names follow Prometheus: base units (seconds, bytes), ``_total`` for what only grows. The number of
series is bounded by the number of disks: every label but a disk's own has a fixed set of values.
No label has an image's name, as it may hold a password and anybody on this machine may scrape.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, cast

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family

from xvd.backend.counters import BackCounters
from xvd.blkif.handshake import BackendState
from xvd.blkif.validate import Refusal
from xvd.types import PAGE_SIZE, RING_SECTOR_SIZE

COUNTER: Final = "counter"
GAUGE: Final = "gauge"
HISTOGRAM: Final = "histogram"

DISK_LABELS: Final = ("domain", "name", "vdev")
"""Of every metric of a disk: the guest's number and name, and the disk's name in the guest."""
DAEMON_LABELS: Final = ("daemon",)

BUCKETS: Final = range(12, 34)
"""Those of the 40 powers of two that are exported: from 8.2 us to 17 s."""

STATES: Final[Mapping[BackendState, str]] = {
    BackendState.STARTING: "waiting",
    BackendState.ANNOUNCED: "waiting",
    BackendState.WAITING: "waiting",
    BackendState.CONNECTING: "connecting",
    BackendState.RESUMING: "connecting",
    BackendState.RECONNECTING: "connecting",
    BackendState.CONNECTED: "connected",
    BackendState.CLOSING: "closing",
    BackendState.DISCONNECTING: "closing",
    BackendState.RESETTING: "closing",
    BackendState.REMOVING: "closing",
    BackendState.LEAVING: "closing",
    BackendState.CLOSED: "closed",
    BackendState.GONE: "closed",
    BackendState.REPLACED: "closed",
    BackendState.NO_STORAGE: "failed",
    BackendState.FAILED: "failed",
    BackendState.LOST: "failed",
    BackendState.SPENT: "failed",
}
"""The state of a disk as the metrics have it: few words, whose meaning is plain."""


@dataclass(frozen=True, slots=True)
class Disk:
    """One disk's figures: `figures` as its daemon told them, `counters` of them by name."""

    daemon: str
    domain: str
    vdev: str
    figures: Mapping[str, Any]
    counters: BackCounters

    @classmethod
    def of(cls, daemon: str, figures: Mapping[str, Any]) -> "Disk":
        """Read what a daemon told of a disk; ValueError, TypeError or KeyError for another thing.

        Figures that another version of the daemon does not have are 0.
        """
        domain, vdev = str(figures["disk"]).split("/", 1)
        counters = msgspec.convert(figures["counters"], BackCounters)
        return cls(daemon, domain, vdev, figures, counters)


@dataclass(frozen=True, slots=True)
class Daemon:
    """What came of asking one daemon.

    up: whether it answered. seconds: how long that took. about: its version and when it began; what
    it does not tell is missing. told: the figures of its disks; a frontend's have no counters, and
    are not exported.
    """

    name: str
    up: bool
    seconds: float
    about: Mapping[str, Any] = field(default_factory=dict)
    told: Sequence[Mapping[str, Any]] = ()


ERRORS: Final = ("ask", "figures", "names")
"""What a scrape may fail in part: a daemon that refuses, figures that are none, and the store."""


@dataclass(frozen=True, slots=True)
class Scrape:
    """What one scrape found out.

    names: of guests, by their numbers, as far as they are known. errors: how many there were of
    each of `ERRORS`. version: the exporter's.
    """

    daemons: Sequence[Daemon]
    names: Mapping[str, str]
    errors: Mapping[str, int]
    version: str


def disks_of(daemons: Iterable[Daemon]) -> tuple[list[Disk], int]:
    """(the disks of all daemons, how many could not be read).

    A disk that two daemons know, as while one takes over from the other, is the one's for which it
    is connected.
    """
    found: dict[tuple[str, str], Disk] = {}
    unreadable = 0
    for daemon in daemons:
        for figures in daemon.told:
            try:
                if "counters" not in figures:
                    continue
                disk = Disk.of(daemon.name, figures)
            except (KeyError, TypeError, ValueError):
                unreadable += 1
                continue
            key = disk.domain, disk.vdev
            if key not in found or figures.get("state") == "CONNECTED":
                found[key] = disk
    return list(found.values()), unreadable


Values = tuple[str, ...]
"""The values of a metric's own labels."""


class Histogram(NamedTuple):
    """Pairs of (upper bound in seconds, how many were below), and the sum of all in seconds; None
    where the daemon's version does not count that."""

    buckets: list[tuple[str, float]]
    sum: float | None


@dataclass(frozen=True, slots=True)
class Metric:
    """A row of the table. origin: where the figure comes from, for people, in Markdown."""

    name: str
    kind: str
    help: str
    origin: str
    samples: Callable[[Any], Iterable[tuple[Values, Any]]]
    labels: Values = ()

    def family(self, common: Values) -> Family:
        """Return it without samples; `common`: the labels in front of its own."""
        made = _FAMILIES[self.kind](self.name, self.help, labels=(*common, *self.labels))
        return cast(Family, made)


_FAMILIES: Final[Mapping[str, type[Any]]] = {
    COUNTER: CounterMetricFamily,
    GAUGE: GaugeMetricFamily,
    HISTOGRAM: HistogramMetricFamily,
}


def _figure(kind: str, name: str, text: str, figure: str, scale: int = 1) -> Metric:
    """Make a metric of one of a disk's counters."""

    def samples(disk: Disk) -> Iterator[tuple[Values, int]]:
        yield (), getattr(disk.counters, figure) * scale

    return Metric(name, kind, text, f"`{figure}`", samples)


def _by(label: str, name: str, text: str, figures: Mapping[str, str]) -> Metric:
    """Make a metric of several of a disk's counters, which a label tells apart."""

    def samples(disk: Disk) -> Iterator[tuple[Values, int]]:
        for value, figure in figures.items():
            yield (value,), getattr(disk.counters, figure)

    origin = f"`{' '.join(figures.values())}`"
    return Metric(name, COUNTER, text, origin, samples, (label,))


def _told(name: str, text: str, figure: str, scale: int = 1) -> Metric:
    """Make a gauge of something else that is told of a disk; 0 while there is no such thing."""

    def samples(disk: Disk) -> Iterator[tuple[Values, int]]:
        value = disk.figures.get(figure, 0)
        yield (), (value if isinstance(value, int) else bool(value)) * scale

    return Metric(name, GAUGE, text, f"`{figure}`", samples)


def _latency(disk: Disk) -> Iterator[tuple[Values, Histogram]]:
    for op in ("read", "write", "flush", "discard"):
        counts = disk.counters.latency.get(op, [])
        below = [(repr(2.0 ** (i + 1) / 1e9), float(sum(counts[: i + 1]))) for i in BUCKETS]
        total_ns = disk.counters.latency_ns.get(op, None if counts else 0)
        seconds = None if total_ns is None else total_ns / 1e9
        yield (op,), Histogram([*below, ("+Inf", float(sum(counts)))], seconds)


def _refusals(disk: Disk) -> Iterator[tuple[Values, int]]:
    for reason in Refusal:
        if reason is not Refusal.NONE:
            name = reason.name.lower()
            yield (name,), disk.counters.refusals.get(name, 0)


def _states(disk: Disk) -> Iterator[tuple[Values, int]]:
    known = str(disk.figures.get("state", ""))
    now = STATES[BackendState[known]] if known in BackendState.__members__ else ""
    for state in dict.fromkeys(STATES.values()):
        yield (state,), int(state == now)


def _disk_info(disk: Disk) -> Iterator[tuple[Values, int]]:
    yield (disk.daemon, *(str(disk.figures.get(it, "")) for it in ("protocol", "mode", "group"))), 1


DISK_METRICS: Final = (
    Metric("xvd_disk_info", GAUGE, "What a disk is; always 1.",
           "`protocol`, `mode`, `group` (docs/settings.md, Limits)",
           _disk_info, ("daemon", "protocol", "mode", "group")),
    Metric("xvd_disk_state", GAUGE, "1 for the state that a disk is in, 0 for the others.",
           "`state`", _states, ("state",)),
    _told("xvd_disk_held", "1 while a disk waits for its storage to come back.", "held"),
    _told("xvd_disk_paused", "1 while a disk is paused by xvd pause.", "paused"),
    _told("xvd_disk_size_bytes", "Size of a disk.", "sectors", RING_SECTOR_SIZE),
    _told("xvd_disk_queues", "Rings of a connected disk.", "queues"),
    _told("xvd_disk_ring_pages", "Pages of each ring of a connected disk.", "ring_pages"),
    _by("op", "xvd_disk_requests_total", "Requests taken off the rings.",
        {"read": "rd_req", "write": "wr_req", "flush": "f_req", "discard": "ds_req"}),
    _figure(COUNTER, "xvd_disk_read_bytes_total", "Bytes read.", "rd_sect", RING_SECTOR_SIZE),
    _figure(COUNTER, "xvd_disk_written_bytes_total", "Bytes written.", "wr_sect", RING_SECTOR_SIZE),
    _figure(COUNTER, "xvd_disk_discarded_bytes_total", "Bytes discarded.", "ds_sect",
            RING_SECTOR_SIZE),
    Metric("xvd_disk_request_duration_seconds", HISTOGRAM,
           "Time from taking a request off the ring to answering it.",
           "`latency`, `latency_ns`", _latency, ("op",)),
    _figure(GAUGE, "xvd_disk_requests_in_flight", "Requests without an answer yet.", "in_flight"),
    _figure(COUNTER, "xvd_disk_failed_requests_total",
            "Requests answered with a failure, refused ones included.", "errors"),
    Metric("xvd_disk_refused_requests_total", COUNTER,
           "Requests that break the protocol or the disk's bounds, by reason.",
           "`refusals`", _refusals, ("reason",)),
    _figure(COUNTER, "xvd_disk_storage_errors_total", "Operations that the storage failed.",
            "storage_errors"),
    _figure(COUNTER, "xvd_disk_put_back_requests_total",
            "Requests put back because the storage was away.", "held"),
    _figure(COUNTER, "xvd_disk_begun_again_requests_total",
            "Requests begun again: a dead daemon's, or after the storage was away.", "recovered"),
    _figure(COUNTER, "xvd_disk_limit_waits_total", "Times that a ring had to wait for a limit.",
            "throttled"),
    _figure(COUNTER, "xvd_disk_waits_total",
            "Requests that had to wait on the ring, for room or for a barrier.", "oo_req"),
    _figure(COUNTER, "xvd_disk_starved_requests_total",
            "Requests that failed because this host had no room for their pages.", "starved"),
    _figure(GAUGE, "xvd_disk_persistent_grants", "Pages of the guest that stay mapped.",
            "persistent_grants"),
    _by("result", "xvd_disk_persistent_grant_lookups_total",
        "Uses of a persistent grant: found mapped, or not.",
        {"hit": "persistent_hits", "miss": "persistent_misses"}),
    _figure(COUNTER, "xvd_disk_persistent_grants_purged_total",
            "Persistent grants unmapped for age or room.", "persistent_purged"),
    _by("action", "xvd_disk_grant_pages_total", "Pages mapped, unmapped and copied.",
        {"map": "mapped", "unmap": "unmapped", "copy": "copied"}),
    _by("action", "xvd_disk_grant_calls_total", "Calls that mapped, unmapped and copied.",
        {"map": "map_calls", "unmap": "unmap_calls", "copy": "copy_calls"}),
    _figure(GAUGE, "xvd_disk_buffer_bytes", "Memory that grant copy keeps between requests.",
            "buffer_pages", PAGE_SIZE),
    _by("result", "xvd_disk_notifications_total",
        "Events to the guest: sent, or held back because it had asked for none.",
        {"sent": "notified", "suppressed": "suppressed"}),
    _figure(COUNTER, "xvd_disk_queue_steps_total", "Rounds of a disk's queues.", "steps"),
)  # fmt: skip
"""Of each disk, with `DISK_LABELS`."""

LEFT_OUT: Final = {
    "requests": "the sum of the requests by op",
    "responses": "the requests without those in flight",
    "buffer_pages_released": "of interest to who changes the code",
}
"""A backend's counters that are no metric, and why."""


def _version(daemon: Daemon) -> Iterator[tuple[Values, int]]:
    if daemon.up:
        yield (str(daemon.about.get("version", "")),), 1


def _began(daemon: Daemon) -> Iterator[tuple[Values, float]]:
    began = daemon.about.get("started_s")
    if isinstance(began, int | float):
        yield (), began


DAEMON_METRICS: Final = (
    Metric("xvd_up", GAUGE, "1 if a daemon answers; 0 if it is dead, hangs, or may not be asked.",
           "the control socket", lambda daemon: [((), int(daemon.up))]),
    Metric("xvd_daemon_info", GAUGE, "The version of a daemon that answers; always 1.",
           "the daemon's `about`", _version, ("version",)),
    Metric("xvd_daemon_start_time_seconds", GAUGE, "When a daemon began, since 1970.",
           "the daemon's `about`", _began),
    Metric("xvd_daemon_answer_duration_seconds", GAUGE, "How long a daemon took to answer.",
           "the exporter", lambda daemon: [((), daemon.seconds)]),
)  # fmt: skip
"""Of each daemon that has a control socket, with `DAEMON_LABELS`."""


def _errors(scrape: Scrape) -> Iterator[tuple[Values, int]]:
    for what in ERRORS:
        yield (what,), scrape.errors.get(what, 0)


EXPORTER_METRICS: Final = (
    Metric("xvd_daemons", GAUGE, "Daemons that have a control socket, living or not.",
           "the control directory", lambda scrape: [((), len(scrape.daemons))]),
    Metric("xvd_exporter_info", GAUGE, "The version of the exporter; always 1.",
           "the exporter", lambda scrape: [((scrape.version,), 1)], ("version",)),
    Metric("xvd_exporter_errors_total", COUNTER,
           "What scrapes could not do: ask a daemon, read its figures, read guests' names.",
           "the exporter", _errors, ("what",)),
)  # fmt: skip
"""Of the host and of the exporter itself."""

TABLES: Final = (
    (EXPORTER_METRICS, ()), (DAEMON_METRICS, DAEMON_LABELS), (DISK_METRICS, DISK_LABELS),
)  # fmt: skip
"""Every metric, and the labels that come before its own."""


def families(scrape: Scrape, disks: Iterable[Disk]) -> Iterator[Family]:
    """Yield every metric with what was found out."""
    things: Sequence[Sequence[tuple[Values, object]]] = (
        [((), scrape)],
        [((daemon.name,), daemon) for daemon in scrape.daemons],
        [((it.domain, scrape.names.get(it.domain, ""), it.vdev), it) for it in disks],
    )
    for (metrics, common), labelled in zip(TABLES, things, strict=True):
        for metric in metrics:
            yield _filled(metric, common, labelled)


def _filled(metric: Metric, common: Values, things: Sequence[tuple[Values, object]]) -> Family:
    family: Any = metric.family(common)
    for labels, thing in things:
        for values, value in metric.samples(thing):
            parts = value if metric.kind == HISTOGRAM else (value,)
            family.add_metric((*labels, *values), *parts)
    return cast(Family, family)
