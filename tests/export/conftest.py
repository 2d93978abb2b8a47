# SPDX-License-Identifier: Apache-2.0
"""An export of a small disk in memory; every test ends with the machine's accounting balanced."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from served_disk import SMALL, Served, served_disk


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with served_disk(f"memory:{SMALL}", tmp_path, name="disk", description="a test") as disk:
        yield disk
