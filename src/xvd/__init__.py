# SPDX-License-Identifier: Apache-2.0
"""Xen virtual disks: both ends of the Xen paravirtual block device, in user space.

`emulated` and `open_image` make a disk of an image in one call; `Disk` and `SyncDisk` are what they
give. Each name is imported when it is first asked for, so that ``import xvd`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xvd.embed import emulated, open_image
    from xvd.errors import XvdError
    from xvd.frontend.disk import Disk
    from xvd.frontend.sync import SyncDisk

__version__ = "0.1.0"
__all__ = ["Disk", "SyncDisk", "XvdError", "__version__", "emulated", "open_image"]

_HOMES = {
    "Disk": "xvd.frontend.disk",
    "SyncDisk": "xvd.frontend.sync",
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
