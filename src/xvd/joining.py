# SPDX-License-Identifier: Apache-2.0
"""How a process comes to a domain and finds a disk there: on an emulated host, or on real Xen."""

import os
from pathlib import Path

from xvd.blkif.vdev import disk_name
from xvd.errors import ConfigError
from xvd.machine.emulated.service import connect
from xvd.machine.interface import Machine
from xvd.machine.xen.here import XEN_DIRECTORY, available
from xvd.machine.xen.machine import XenMachine
from xvd.machine.xs.client import XenstoreClient
from xvd.types import DOM0, Domid


async def open_machine(
    host: str | os.PathLike[str] | None, domid: Domid | None
) -> tuple[Machine, Path]:
    """Connect to a domain: a machine, and the directory for what its daemons keep.

    host: an emulated host's directory, where no domid means domain 0; None: the Xen domain that we
    run in. Raises `ConfigError` where there is no Xen, or for a domid that is not the one we run
    in; `PeerClosed` if no host answers in the directory, `GrantError` if it has no such domain.
    """
    if host is not None:
        return connect(host, DOM0 if domid is None else domid), Path(host)
    if not available():
        raise ConfigError("there is no Xen here; name the directory of an emulated host")
    here = await XenMachine.here()
    if domid is not None and domid != here.domid:
        here.close()
        raise ConfigError(f"this is domain {here.domid}: run it in domain {domid}")
    return here, XEN_DIRECTORY


async def demand_disk(store: XenstoreClient, guest: Domid, vdev: int) -> None:
    """Raise `ConfigError` if the guest has no such disk."""
    if not await store.exists(f"device/vbd/{vdev}"):
        name = disk_name(guest, str(vdev))
        raise ConfigError(f"{name}: there is no such disk; attach it first: xvd attach")
