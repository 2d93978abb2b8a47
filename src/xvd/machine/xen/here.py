# SPDX-License-Identifier: Apache-2.0
"""What commands need to know of a Xen domain that have no use for its devices."""

import os
from pathlib import Path
from typing import Final

EVTCHN: Final = "/dev/xen/evtchn"
"""Linux's device of event channels, for user space."""

GNTDEV: Final = "/dev/xen/gntdev"
"""Its device of what other domains have granted."""

XEN_DIRECTORY: Final = Path("/run/xvd")
"""Where the daemons of a real Xen domain have their sockets and journals."""


def available() -> bool:
    """Whether this is a Xen domain whose event channels are open to user space."""
    return os.path.exists(EVTCHN)
