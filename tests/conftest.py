# SPDX-License-Identifier: Apache-2.0
"""What tests everywhere share: drawn examples repeat, unexpected warnings fail, tools are optional.

Outside tools may be missing on a desk and are demanded in CI. A test that causes a warning on
purpose says so with `expect_log`.
"""

import logging
import os
import re
from collections.abc import Callable, Iterator

import hypothesis
import pytest
from hypothesis import HealthCheck
from rig_xen import ON_XEN, reason_of

from xvd.packages import find_tool, package_of

hypothesis.settings.register_profile(
    "ci", derandomize=True, deadline=None, print_blob=True, database=None
)
hypothesis.settings.register_profile(
    "long",
    max_examples=5000,
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On real Xen, skip what it cannot do."""
    for item in items:
        for mark in item.iter_markers("beyond_xen") if ON_XEN else ():
            item.add_marker(pytest.mark.skip(reason=reason_of(mark.args[0])))


@pytest.fixture(scope="session")
def requires_tool() -> Callable[[str], str]:
    """`requires_tool(name)` is the full path of a command or a file of src/xvd/packages.txt.

    Without the tool the test is skipped, naming the package; with XVD_REQUIRE_TOOLS=1 it fails.
    """

    def find(tool: str) -> str:
        package = package_of(tool)
        found = find_tool(tool)
        if found is not None:
            return found
        reason = f"{tool} is missing: install the package {package}"
        if os.environ.get("XVD_REQUIRE_TOOLS") == "1":
            pytest.fail(reason)
        pytest.skip(reason)

    return find


class LogCheck(logging.Handler):
    """Collects warnings and errors; calling it registers a pattern that one of them must match."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []
        self.expected: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def __call__(self, pattern: str) -> None:
        self.expected.append(pattern)

    def matching(self, pattern: str) -> list[str]:
        return [line for line in self.lines if re.search(pattern, line)]


@pytest.fixture(autouse=True)
def expect_log() -> Iterator[LogCheck]:
    """`expect_log(pattern)`: a warning or error matching it is what the test wants to see."""
    check = LogCheck()
    logging.getLogger().addHandler(check)
    yield check
    logging.getLogger().removeHandler(check)
    strange = [s for s in check.lines if not any(re.search(p, s) for p in check.expected)]
    assert strange == [], "logged a warning that no test registered"
    missing = [pattern for pattern in check.expected if not check.matching(pattern)]
    assert missing == [], "did not log what the test registered"
