# SPDX-License-Identifier: Apache-2.0
"""Names within an emulated host's directory."""

from typing import Final

XENSTORE_SOCKET: Final = "socket"
"""Where Xen's own tools look (XENSTORED_RUNDIR)."""

MACHINE_SOCKET: Final = "machine"
