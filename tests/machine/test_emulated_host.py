# SPDX-License-Identifier: Apache-2.0
"""What a process of the emulated machine is handed cannot be turned against the others."""

import fcntl
import os

import pytest

from xvd.machine.emulated.host import Host
from xvd.machine.emulated.limits import Limits
from xvd.types import Domid


def test_a_domains_memory_cannot_be_cut_short_by_who_has_it() -> None:
    # Whoever had mapped it was ended by SIGBUS, the backend with all its other guests too.
    host = Host(Limits(pages=64, grefs=64, tracks=64, ports=64))
    host.create_domain(Domid(1))
    fds = host.open(Domid(1)).state(Domid(1))[:2]

    for fd in fds:
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 4096)
        with pytest.raises(PermissionError):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        os.close(fd)
    host.close()
