# SPDX-License-Identifier: Apache-2.0
"""Running the NBD world's tools: they are optional on a desk and demanded in CI."""

import os
import subprocess

import pytest

from xvd.packages import find_tool, package_of


def require(*names: str) -> None:
    """Skip the test, or with XVD_REQUIRE_TOOLS=1 fail it, unless all of these are installed."""
    for name in names:
        if find_tool(name) is None:
            missing(f"{name} is missing: install the package {package_of(name)}")


def missing(reason: str) -> None:
    """Skip the test, or with XVD_REQUIRE_TOOLS=1 fail it."""
    if os.environ.get("XVD_REQUIRE_TOOLS") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


def try_run(*command: str | os.PathLike[str]) -> subprocess.CompletedProcess[str]:
    """Run a tool to its end, whatever that is."""
    words = [str(word) for word in command]
    # The system's own first: nbdsh is a Python program, and its module is the system Python's.
    path = f"/usr/sbin:/usr/bin:/sbin:/bin:{os.environ['PATH']}"
    require(words[0])
    return subprocess.run(
        words,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env=os.environ | {"PATH": path},
        stdin=subprocess.DEVNULL,
    )


def run(*command: str | os.PathLike[str]) -> str:
    """Run a tool that must succeed; its stdout. If it fails, everything that it said is shown."""
    done = try_run(*command)
    if done.returncode:
        pytest.fail(f"{command}: exit {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout
