# SPDX-License-Identifier: Apache-2.0
"""What tests everywhere share: outside tools are optional on a desk and demanded in CI."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def requires_tool() -> Callable[[str, str], str]:
    """`requires_tool(name_or_path, package)` is the tool's full path.

    Without the tool the test is skipped, naming the package; with XVD_REQUIRE_TOOLS=1 it fails.
    """

    def find(tool: str, package: str) -> str:
        found = shutil.which(tool)
        if found is None and Path(tool).is_file():
            found = tool
        if found is not None:
            return found
        reason = f"{tool} is missing: install the package {package}"
        if os.environ.get("XVD_REQUIRE_TOOLS") == "1":
            pytest.fail(reason)
        pytest.skip(reason)

    return find
