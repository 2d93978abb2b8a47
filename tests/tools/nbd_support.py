# SPDX-License-Identifier: Apache-2.0
"""Running the NBD world's tools: they are optional on a desk and demanded in CI."""

import os
import shutil
import subprocess

import pytest

PACKAGES = {
    "nbdinfo": "libnbd-bin",
    "nbdcopy": "libnbd-bin",
    "nbdsh": "python3-libnbd",
    "nbdfuse": "nbdfuse",
    "qemu-img": "qemu-utils",
    "qemu-io": "qemu-utils",
    "fio": "fio",
    "mkfs.ext4": "e2fsprogs",
    "e2fsck": "e2fsprogs",
    "losetup": "mount",
    "fusermount3": "fuse3",
}


def require(*names: str) -> None:
    """Skip the test, or with XVD_REQUIRE_TOOLS=1 fail it, unless all of these are installed."""
    for name in names:
        if shutil.which(name) is None:
            missing(f"{name} is missing: install the package {PACKAGES[name]}")


def missing(reason: str) -> None:
    if os.environ.get("XVD_REQUIRE_TOOLS") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


def run(*command: str | os.PathLike[str], check: bool = True) -> str:
    """Run a tool; its stdout. The failure of a tool shows everything that it said."""
    require(str(command[0]))
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    if check and done.returncode:
        pytest.fail(f"{command}: exit {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout
