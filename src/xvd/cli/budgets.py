# SPDX-License-Identifier: Apache-2.0
"""What this host has for the disks of a daemon."""

import contextlib
import resource

from xvd.backend.budget import Budget
from xvd.backend.limits import XEN_MAPTRACK, descriptor_limits, limits_of_host
from xvd.machine.emulated.limits import Limits
from xvd.machine.interface import Machine
from xvd.machine.xen.machine import XenMachine


def budget_of(machine: Machine) -> Budget:
    """Return what this host has for the disks of a daemon on such a machine."""
    if not isinstance(machine, XenMachine):
        return emulated_budget()
    return _budget(XEN_MAPTRACK)


def emulated_budget() -> Budget:
    """Return the budget of an emulated machine, as `budget_of`."""
    return _budget(Limits().tracks)


def _budget(tracks: int) -> Budget:
    _, most = descriptor_limits()
    with contextlib.suppress(OSError, ValueError):
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return Budget(limits_of_host(tracks))
