# SPDX-License-Identifier: Apache-2.0
"""What this host has for the disks of a daemon."""

import contextlib
import resource

from xvd.backend.budget import Amounts, Budget
from xvd.backend.limits import XEN_MAPTRACK, descriptor_limits, limits_of_host
from xvd.machine.emulated.limits import Limits
from xvd.machine.interface import Machine
from xvd.machine.xen.machine import XenMachine


def amounts_of(machine: Machine) -> Amounts:
    """Return what this host has for the disks of a daemon on such a machine."""
    if not isinstance(machine, XenMachine):
        return _amounts(Limits().tracks)
    return _amounts(XEN_MAPTRACK)


def emulated_budget() -> Budget:
    """Return all that this host has for the disks of an emulated machine."""
    return Budget(_amounts(Limits().tracks))


def _amounts(tracks: int) -> Amounts:
    _, most = descriptor_limits()
    with contextlib.suppress(OSError, ValueError):
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return limits_of_host(tracks)
