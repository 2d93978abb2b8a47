# SPDX-License-Identifier: Apache-2.0
"""The file of a backend's settings, ``/etc/xvd/xvd.toml``: read, checked, and shown.

The one idea: a table of the file is a class. Those of settings are made from the tables that
``xvd set`` goes by, so a setting is defined once, and a range is checked by the same code.
"""

import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NoReturn, TypeVar, get_args

import msgspec
from msgspec import UNSET, Meta, UnsetType

from xvd.backend.groups import Groups
from xvd.backend.iotune import IoTune
from xvd.backend.settings import Settings
from xvd.blkif.vdev import parse_disk
from xvd.engines.uri import parse_layer
from xvd.errors import ConfigError, describe
from xvd.xenbus.settings import SettingsBase, setting

Some = TypeVar("Some", bound=SettingsBase)

DEFAULT_PATH: Final = Path("/etc/xvd/xvd.toml")

Kind = Literal["vbd", "vbd3"]
KINDS: Final[tuple[str, ...]] = get_args(Kind)
"""Of backends whose disks are blkif's: libxl's phy and driver domains, and its tap slot."""


class Daemon(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What a daemon is told about itself. Most of it holds from its next start on."""

    isolation: Annotated[
        Literal["auto", "shared", "guest", "process"],
        Meta(
            title='"shared", "guest", "process" or "auto"',
            description="one process for every guest; one for each, which reaches nothing but "
            "that guest's disks; or one for each without that fence. auto: guest on real Xen, if "
            "no group is named; else shared",
        ),
    ] = "auto"
    kinds: Annotated[
        list[Kind],
        Meta(
            title='a list of "vbd" and "vbd3"',
            description="kinds of backend to serve; none: as xvd backend --help says of --kind",
        ),
    ] = []
    copy: Annotated[
        bool, Meta(title="true or false", description="grant copy instead of mapping")
    ] = False
    layers: Annotated[
        list[str],
        Meta(
            title="a list of layers in quotes",
            description="layers in front of every disk's storage; the first is nearest to the "
            "guest (docs/engines.md)",
        ),
    ] = []
    state_directory: Annotated[
        str,
        Meta(
            title="a path that begins with /",
            pattern="^(/.*)?$",
            description="where the journals of rings are kept for a successor; it should be memory,"
            " as /run is; none: /run/xvd/state",
        ),
    ] = ""
    log_level: Annotated[
        Literal["warning", "info", "debug"],
        Meta(
            title='"warning", "info" or "debug"',
            description="what is logged; the command line's -v and -vv stand before it",
        ),
    ] = "warning"


def _at_most(meaning: str) -> int | None:
    return setting(None, 1, 10**15, meaning, usual="what there is")


@dataclass(frozen=True, slots=True)
class Ceiling(SettingsBase):
    """The most that all disks together may keep of this host, where that is less than there is."""

    mappings: int | None = _at_most("mappings of the process")
    grants: int | None = _at_most("map-track entries of the domain")
    memory: int | None = _at_most("bytes of memory")
    descriptors: int | None = _at_most("open files of the process")


def _table_of(settings: type[SettingsBase], without: Sequence[str] = ()) -> type[msgspec.Struct]:
    """Make the class of a table whose names are those of some settings; ranges are theirs."""
    fields: list[tuple[str, Any, Any]] = []
    annotated: Any = Annotated
    for name, row in settings.table().items():
        if name in without:
            continue
        of = str if row.is_text else bool if row.is_switch else int
        title = "true or false" if row.is_switch else row.takes
        meta = Meta(title=title, description=row.meaning)
        fields.append((name, annotated[of, meta] | UnsetType, UNSET))
    return msgspec.defstruct(settings.__name__, fields, forbid_unknown_fields=True)


EVERY_DISK: Final = _table_of(Settings)
GROUP: Final = _table_of(IoTune, ["group_name"])
TABLES: Final[dict[str, tuple[type[msgspec.Struct], bool]]] = {
    "daemon": (Daemon, False),
    "budget": (_table_of(Ceiling), False),
    "settings": (EVERY_DISK, False),
    "groups": (GROUP, True),
    "disks": (EVERY_DISK, True),
}
"""Each table's class; and whether it holds tables of that class by name, instead of values."""


@dataclass(frozen=True, slots=True)
class Configuration:
    """What a file says, checked.

    settings, groups, disks: ``NAME=VALUE``, as `Settings.parse` and `Groups` take them, by the name
    of the group or the disk. lines: where in the file each value stands, by its table (and the
    name of a group or disk) and its own name.
    """

    path: Path | None = None
    daemon: Daemon = field(default_factory=Daemon)
    budget: Ceiling = field(default_factory=Ceiling)
    settings: list[str] = field(default_factory=list)
    groups: dict[str, list[str]] = field(default_factory=dict)
    disks: dict[str, list[str]] = field(default_factory=dict)
    lines: dict[tuple[str, ...], int] = field(default_factory=dict)

    @property
    def overrides(self) -> dict[str, list[str]]:
        """Return what is set for single disks, named as `parse_disk` has it."""
        return {parse_disk(name): texts for name, texts in self.disks.items()}


def read(path: Path) -> Configuration:
    """Read and check a file.

    Raises `ConfigError` for one that is not there, is no TOML, or says what cannot be done; the
    text names the file, the line and the remedy.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{describe(error)}; name a file of settings") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: this is no TOML: {describe(error)}") from None
    return parse(text, path)


def parse(text: str, path: Path) -> Configuration:
    """Check a file's text; `ConfigError` as of `read`."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        what, _, place = str(error).rstrip(")").partition(" (at ")
        where = f"{path}: {place}" if place else str(path)
        raise ConfigError(f"{where}: this is no TOML: {what}") from None
    return _Checker(path, _lines_of(text)).check(document)


class _Checker:
    """Turns a document into a `Configuration`; every `ConfigError` says where."""

    def __init__(self, path: Path, lines: dict[tuple[str, ...], int]) -> None:
        self._path = path
        self._lines = lines

    def check(self, document: Mapping[str, Any]) -> Configuration:
        for name in document:
            if name not in TABLES:
                self._refuse((name,), f"there is no table [{name}]{_instead(name, list(TABLES))}")
        found: dict[str, Any] = {}
        for name, (_, by_name) in TABLES.items():
            value = document.get(name, {})
            if not isinstance(value, dict):
                self._refuse((name,), f"{name} is a table: write [{name}]")
            if by_name:
                found[name] = {each: self._table((name, each), of) for each, of in value.items()}
            else:
                found[name] = self._table((name,), value)
        daemon: Daemon = found["daemon"]
        self._daemon(daemon)
        settings = self._texts(found["settings"])
        groups = {name: self._texts(values) for name, values in found["groups"].items()}
        disks: dict[str, list[str]] = {}
        everyone = self._settings(("settings",), Settings(), settings)
        for name, values in found["disks"].items():
            where = ("disks", name)
            try:
                disk = parse_disk(name)
            except ValueError as error:
                self._refuse(where, str(error))
            if disk in map(parse_disk, disks):
                self._refuse(where, f"[{_written(where)}] is the same disk as another table's")
            disks[name] = self._texts(values)
            self._settings(where, everyone, disks[name])
        for name, texts in groups.items():
            try:
                Groups({name: texts})
            except ConfigError as error:
                self._refuse_setting(("groups", name), error)
        budget = self._settings(("budget",), Ceiling(), self._texts(found["budget"]))
        return Configuration(self._path, daemon, budget, settings, groups, disks, self._lines)

    def _table(self, where: tuple[str, ...], value: object) -> msgspec.Struct:
        of = TABLES[where[0]][0]
        try:
            return msgspec.convert(value, of)
        except msgspec.ValidationError as error:
            self._refuse_value(where, of, str(error))

    def _refuse_value(
        self, where: tuple[str, ...], of: type[msgspec.Struct], text: str
    ) -> NoReturn:
        """Say in our words what msgspec found."""
        names = of.__struct_fields__
        if unknown := re.match(r"Object contains unknown field `([^`]*)`", text):
            there_is = f"there is no setting {unknown[1]!r}{_instead(unknown[1], names)}"
            self._refuse((*where, unknown[1]), f"[{_written(where)}]: {there_is}")
        name = re.search(r"at `\$\.(\w+)", text)
        if name is None:
            self._refuse(where, f"{_written(where)} is a table: write [{_written(where)}]")
        said = f"{name[1]} takes {takes(of, name[1])}"
        self._refuse((*where, name[1]), f"[{_written(where)}]: {said}")

    def _daemon(self, daemon: Daemon) -> None:
        for layer in daemon.layers:
            try:
                parse_layer(layer)
            except ConfigError as error:
                self._refuse(("daemon", "layers"), f"[daemon]: layers: {error}")

    def _settings(self, where: tuple[str, ...], of: Some, texts: Sequence[str]) -> Some:
        try:
            return of.changed(of.parse(texts))
        except ConfigError as error:
            self._refuse_setting(where, error)

    def _refuse_setting(self, where: tuple[str, ...], error: ConfigError) -> NoReturn:
        """Say where a value stands that is refused; such an error begins with its name."""
        name = re.split(r"\W", str(error), maxsplit=1)[0]
        self._refuse((*where, name), f"[{_written(where)}]: {error}")

    @staticmethod
    def _texts(values: msgspec.Struct) -> list[str]:
        """``NAME=VALUE`` of what is set."""
        found = msgspec.structs.asdict(values)
        return [
            f"{name}={int(value) if isinstance(value, bool) else value}"
            for name, value in found.items()
            if value is not UNSET
        ]

    def _refuse(self, where: tuple[str, ...], text: str) -> NoReturn:
        """Raise `ConfigError`, with the line of this name, or of the table that it is in."""
        line = self._lines.get(where) or self._lines.get(where[:-1])
        raise ConfigError(f"{self._path}{f':{line}' if line else ''}: {text}")


def takes(of: type[msgspec.Struct], name: str) -> str:
    """Return which values a name of a table takes, in words."""
    return _meta(of, name).title or ""


def meaning(of: type[msgspec.Struct], name: str) -> str:
    """Return what a name of a table means, in a line."""
    return _meta(of, name).description or ""


def _meta(of: type[msgspec.Struct], name: str) -> Meta:
    """Return what was said of a field when its class was made."""
    found = of.__annotations__[name]
    parts = (found, *get_args(found))
    metas = (meta for part in parts for meta in getattr(part, "__metadata__", ()))
    return next(metas, Meta())


def _instead(name: str, names: Sequence[str]) -> str:
    """Return what a wrong name should have been, as the end of a sentence."""
    close = difflib.get_close_matches(name, names, 1)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(names)}"


def _written(where: Sequence[str]) -> str:
    """Return the name of a table as TOML has it."""
    return ".".join(
        part if re.fullmatch(r"[A-Za-z0-9_-]+", part) else f'"{part}"' for part in where
    )


def _lines_of(text: str) -> dict[tuple[str, ...], int]:
    """Where each table and each name stands: tomllib keeps no lines, but reads what is before =."""
    lines: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] = ()
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[([^\[].*)\]", line):
            table = _key_of(header[1])
            lines.setdefault(table, number)
        elif "=" in line and (name := _key_of(line.partition("=")[0])):
            for end in range(1, len(name) + 1):
                lines.setdefault((*table, *name[:end]), number)
    return lines


def _key_of(text: str) -> tuple[str, ...]:
    """The parts of a dotted key; none of what is no key."""
    try:
        found: Any = tomllib.loads(f"{text} = 0")
    except tomllib.TOMLDecodeError:
        return ()
    parts: list[str] = []
    while isinstance(found, dict) and found:  # a comment has none
        ((name, found),) = found.items()
        parts.append(name)
    return tuple(parts)


# ---- What is shown -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shown:
    """One value that holds. origin: ``default``, or the file and its line."""

    table: str
    name: str
    value: object
    origin: str


def shown(configuration: Configuration) -> Iterator[Shown]:
    """Everything that a daemon goes by that is begun with this file, and where each is from."""

    def origin(*where: str) -> str:
        if where not in configuration.lines:
            return "default"
        return f"{configuration.path}:{configuration.lines[where]}"

    values = {
        "daemon": msgspec.structs.asdict(configuration.daemon),
        "budget": configuration.budget.values(),
        "settings": Settings.of(configuration.settings).values(),
    }
    for table, named in values.items():
        for name, value in named.items():
            yield Shown(table, name, value, origin(table, name))
    for table, each in (("groups", configuration.groups), ("disks", configuration.disks)):
        for one, texts in each.items():
            for name, value in Settings.parse(texts).items():
                yield Shown(_written((table, one)), name, value, origin(table, one, name))
