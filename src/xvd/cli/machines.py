# SPDX-License-Identifier: Apache-2.0
"""The machine that a daemon or a frontend runs on."""

from pathlib import Path

from xvd import joining
from xvd.cli.common import DEFAULT_HOST
from xvd.machine.interface import Machine
from xvd.machine.xen.here import available
from xvd.types import Domid


async def open_machine(host: Path | None, domid: Domid | None) -> tuple[Machine, Path]:
    """Connect to a domain, as `joining.open_machine`; without a host and without Xen, to one of the
    emulated host in the usual place."""
    if host is None and not available():
        host = DEFAULT_HOST
    return await joining.open_machine(host, domid)
