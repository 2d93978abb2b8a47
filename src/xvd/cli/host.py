# SPDX-License-Identifier: Apache-2.0
"""``xvd host``: an emulated Xen host for several processes."""

import os
import shutil
from pathlib import Path
from typing import Annotated

import typer

from xvd.cli import common, output, running
from xvd.cli.control import FIGURES
from xvd.errors import ConfigError
from xvd.files import own_directory
from xvd.machine.emulated.paths import MACHINE_SOCKET, XENSTORE_SOCKET
from xvd.machine.emulated.service import EmulatedHost
from xvd.sockets import PATH_MAX


def host(
    directory: Annotated[Path, typer.Argument(help="Where its sockets go; made if need be.")],
    verbose: common.Verbose = 0,
) -> int:
    """Run an emulated Xen host: its xenstore at DIRECTORY/socket, its machine at DIRECTORY/machine.

    Xen's own xenstore tools find it with XENSTORED_RUNDIR=DIRECTORY. Prints the directory when it
    is up, and runs until SIGINT or SIGTERM.
    """
    common.start_logging(verbose)
    try:
        os.close(own_directory(directory.resolve(), mode=0o770))
    except OSError as error:
        raise ConfigError(f"{directory}: {error.strerror}; choose another directory") from None
    for name in (XENSTORE_SOCKET, MACHINE_SOCKET):
        if len(os.fsencode(directory / name)) > PATH_MAX:
            raise ConfigError(f"{directory}: too long for a socket's path; choose a shorter one")
    return running.run(_host(directory))


async def _host(directory: Path) -> int:
    stop = running.Stop()
    async with EmulatedHost() as emulated:
        await emulated.listen(directory)
        output.tell(f"{directory}\n")
        await stop.wait()
    # The daemons' sockets and journals end with the host.
    for name in ("control", FIGURES, "state"):
        shutil.rmtree(directory / name, ignore_errors=True)
    return 0
