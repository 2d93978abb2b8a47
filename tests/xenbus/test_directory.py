# SPDX-License-Identifier: Apache-2.0
"""A device's directory, changed and reported on while the toolstack may have removed it."""

from pathlib import Path

import pytest
from xs_rig import with_server

from xvd.errors import XenstoreError
from xvd.machine.xs.client import XenstoreClient
from xvd.machine.xs.server import XenstoreServer
from xvd.xenbus.directory import change_device, report_error

HERE = "/local/domain/0"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "socket"


def test_an_error_is_reported_of_a_device_that_is_there_and_of_no_other(path: Path) -> None:
    # Written after the removal it would stay for ever.
    async def work(_: XenstoreServer, store: XenstoreClient) -> None:
        await store.write("dev/1/state", "2")

        for device in ("dev/1", "dev/2"):
            await report_error(store, device, "broken")

        assert await store.try_read(f"{HERE}/error/dev/1/error") == "broken"
        assert not await store.exists(f"{HERE}/error/dev/2")

    with_server(path, work)


def test_nodes_that_are_gone_may_be_removed_and_one_that_is_refused_changes_nothing(
    path: Path,
) -> None:
    async def work(_: XenstoreServer, store: XenstoreClient) -> None:
        await store.write("dev/1/state", "2")
        await store.write("dev/1/old", "")

        assert await change_device(store, "dev/1", state=4, remove=["old", "queue-0/ring-ref"])
        with pytest.raises(XenstoreError):
            await change_device(store, "dev/1", state=5, write={"a": "1", "b//c": "1"})

        assert await store.ls("dev/1") == ["state"]
        assert await store.read("dev/1/state") == "4"

    with_server(path, work)
