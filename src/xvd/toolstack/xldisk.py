# SPDX-License-Identifier: Apache-2.0
"""xl's disk syntax (xl-disk-configuration(5)): ``target, format, vdev, access`` or key=value.

``target=`` must come last and takes the rest of the string, commas included, so that a URI can
stand there.
"""

from dataclasses import dataclass, field
from pathlib import Path

from xvd.blkif.vdev import parse_vdev
from xvd.engines.formats import FORMATS as KNOWN_FORMATS
from xvd.engines.text import in_format, split_scheme
from xvd.engines.uri import PATH_SCHEMES, split_layers
from xvd.errors import ConfigError

FORMATS = ("raw", "qcow", "qcow2", "vhd", "qed")
BACKEND_TYPES = ("phy", "tap", "qdisk", "standalone")
_ACCESS = {"r": False, "ro": False, "w": True, "rw": True}
_BEFORE_A_PATH = {*FORMATS, *KNOWN_FORMATS, *PATH_SCHEMES, "aio", "phy", "tap", "tap2"}
"""What may stand before a path, with a colon."""
_POSITIONAL = ("target", "format", "vdev", "access")


@dataclass(slots=True)
class XlDisk:
    """A disk as the administrator describes it."""

    target: str = ""
    format: str = "raw"
    vdev: str = ""
    writable: bool = True
    cdrom: bool = False
    backend: str = ""
    backendtype: str = "phy"
    script: str = ""
    discard: bool = True
    direct_io_safe: bool = False
    trusted: bool = True
    _seen: set[str] = field(default_factory=set)

    @property
    def params(self) -> str:
        """The ``params`` node: the target, behind its format where that is the user's word and not
        the one that goes without saying."""
        return in_format(self.target, self.format) if "format" in self._seen else self.target

    @property
    def number(self) -> int:
        """The vdev's number."""
        return parse_vdev(self.vdev)


_FLAGS = {
    "cdrom": ("cdrom", True),
    "discard": ("discard", True),
    "no-discard": ("discard", False),
    "direct-io-safe": ("direct_io_safe", True),
    "trusted": ("trusted", True),
    "untrusted": ("trusted", False),
}


def _choose(key: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise ConfigError(f"unknown value {value!r} for {key}; there are {', '.join(known)}")
    return value


def _set(disk: XlDisk, key: str, value: str) -> None:
    if key in disk._seen:
        raise ConfigError(f"{key} respecified: {value!r}")
    disk._seen.add(key)
    if key == "access":
        disk.writable = _ACCESS[_choose(key, value, tuple(_ACCESS))]
    elif key == "format":
        disk.format = _choose(key, value, FORMATS)
    elif key == "backendtype":
        disk.backendtype = _choose(key, value, BACKEND_TYPES)
    elif key == "devtype":
        disk.cdrom = _choose(key, value, ("disk", "cdrom")) == "cdrom"
    elif key in ("target", "vdev", "backend", "script"):
        setattr(disk, key, value)
    else:
        keys = "target, format, vdev, access, backend, backendtype, script, devtype"
        flags = ", ".join(_FLAGS)
        raise ConfigError(
            f"unknown key {key!r} in a disk description; there are {keys}, and the words {flags}"
        )


def _parts(text: str) -> list[str]:
    """Split at commas, up to a ``target=`` that swallows what follows."""
    parts: list[str] = []
    rest = text
    while rest:
        if rest.lstrip().startswith("target="):
            return [*parts, rest.lstrip()]
        part, _, rest = rest.partition(",")
        parts.append(part.strip())
    return parts


def absolute_target(target: str, directory: Path) -> str:
    """A target whose path, if it is a relative one, begins at `directory`: the user's, not the
    daemon's. Layers, ``file:`` and formats may stand in front; what names no file stays as it is.
    """
    layers, target = split_layers(target)
    if layers:
        return "|".join([*layers, absolute_target(target, directory)])
    scheme, colon, rest = target.partition(":")
    if colon and scheme in _BEFORE_A_PATH:
        return f"{scheme}:{absolute_target(rest, directory)}"
    named = not target or split_scheme(target)[0]
    return target if named else str(directory / target)


def parse_xl_disk(text: str) -> XlDisk:
    """The disk that `text` describes; `ConfigError` names what is wrong with it."""
    disk = XlDisk()
    positional = iter(_POSITIONAL)
    for part in _parts(text):
        key, equals, value = part.partition("=")
        if part in _FLAGS:
            name, wanted = _FLAGS[part]
            setattr(disk, name, wanted)
        elif equals:
            _set(disk, key, value)
        else:
            place = next((name for name in positional if name not in disk._seen), None)
            if place is None:
                raise ConfigError(f"too many positional parameters: {part!r}")
            if part:
                _set(disk, place, part)
    if disk.cdrom:
        disk.writable = False  # as in libxlu: whatever else is said
    if not disk.vdev:
        raise ConfigError(f"{text!r} names no vdev; add vdev=xvda")
    if not disk.target and not disk.cdrom:
        raise ConfigError(f"{text!r} names no target; add target=IMAGE at its end")
    try:
        parse_vdev(disk.vdev)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return disk
