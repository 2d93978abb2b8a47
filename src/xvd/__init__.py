# SPDX-License-Identifier: Apache-2.0
"""Xen virtual disks: both ends of the Xen paravirtual block device, in user space.

`EmulatedHost.serving` makes a disk of an image in one call; `Disk.connect` and `SyncDisk.connect`
join a guest that is there. Each name is imported when it is first asked for, so that ``import xvd``
costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xvd.disks import Disk, SyncDisk
    from xvd.embed import EmulatedHost, emulated, open_image
    from xvd.engines.interface import Engine, EngineInfo, ThreadModel
    from xvd.errors import ConfigError, XvdError

__version__ = "0.1.0"
__all__ = [
    "ConfigError",
    "Disk",
    "EmulatedHost",
    "Engine",
    "EngineInfo",
    "SyncDisk",
    "ThreadModel",
    "XvdError",
    "__version__",
    "emulated",
    "open_image",
]

_HOMES = {
    "ConfigError": "xvd.errors",
    "Disk": "xvd.disks",
    "EmulatedHost": "xvd.embed",
    "Engine": "xvd.engines.interface",
    "EngineInfo": "xvd.engines.info",
    "SyncDisk": "xvd.disks",
    "ThreadModel": "xvd.engines.info",
    "XvdError": "xvd.errors",
    "emulated": "xvd.embed",
    "open_image": "xvd.embed",
}

if not TYPE_CHECKING:  # a checker would take any name for one of ours

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = globals()[name] = getattr(import_module(_HOMES[name]), name)
        return found

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
