# SPDX-License-Identifier: Apache-2.0
"""Which images a guest's worker may open: the toolstack's, and what an administrator has named, for
as long as that is of use."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from rig_disk import disk_world, run

from xvd.machine.xs.client import XenstoreClient
from xvd.service.sandbox.images import Images
from xvd.service.sandbox.reach import Image
from xvd.toolstack.vbd import add, remove_nodes
from xvd.toolstack.xldisk import parse_xl_disk
from xvd.types import DOM0, Domid

DISK, SECOND = "1/51712", "1/51728"
ONE = {"/1.img": Image(True)}
NAMED = Image(True, made=True)


class Guest:
    """A guest with a disk, and its images."""

    def __init__(self, store: XenstoreClient, place: Path) -> None:
        self.store = store
        self.file = place / "granted-1"
        self.images = self.again()

    def again(self) -> Images:
        """What the next supervisor goes by."""
        return Images(self.store, ["vbd"], [], self.file.parent, self.file.name)

    async def may(self) -> dict[str, Image]:
        return await self.images.find([1])

    async def attach(self, words: str) -> Callable[[], Awaitable[None]]:
        vbd = await add(self.store, Domid(1), parse_xl_disk(words), DOM0)
        return lambda: remove_nodes(self.store, vbd)

    def kept(self) -> object:
        return json.loads(self.file.read_bytes()) if self.file.exists() else None


@asynccontextmanager
async def guest(place: Path) -> AsyncIterator[Guest]:
    async with disk_world(serve=False) as world:
        await world.guest()
        found = Guest(world.store, place)
        await found.attach("vdev=xvda,target=/1.img")
        yield found


def test_the_toolstacks_are_opened_as_it_says(tmp_path: Path) -> None:
    async def work() -> None:
        async with guest(tmp_path) as it:
            await it.attach("vdev=xvdb,access=ro,target=/2.img")
            assert await it.may() == ONE | {"/2.img": Image(False)}

    run(work())


def test_what_xapis_storage_says_is_what_is_opened(tmp_path: Path) -> None:
    async def work() -> None:
        async with guest(tmp_path) as it:
            await it.store.write("backend/vbd/1/51712/sm-data/xvd-storage", "raw:/volume")
            assert await it.may() == {"/volume": Image(True)}

    run(work())


def test_what_a_backup_names_is_opened_until_the_call_is_over(tmp_path: Path) -> None:
    async def work() -> None:
        async with guest(tmp_path) as it:
            before = it.images.withdrawals()
            named = it.images.begin(DISK, "/copy.img", moves=False)
            assert await it.may() == ONE | {"/copy.img": NAMED}
            assert it.images.withdrawals() == before
            it.images.end(named, done=True)
            assert await it.may() == ONE
            assert it.images.withdrawals() > before
            assert it.kept() is None

    run(work())


def test_what_a_disk_has_moved_to_is_opened_and_what_it_had_before_is_not(tmp_path: Path) -> None:
    async def work() -> None:
        async with guest(tmp_path) as it:
            for image in ("/a.img", "/b.img"):
                it.images.end(it.images.begin(DISK, image, moves=True), done=True)
            assert await it.may() == ONE | {"/b.img": NAMED}
            assert it.kept() == {DISK: ["/b.img"]}
            assert await it.again().find([1]) == ONE | {"/b.img": NAMED}

    run(work())


def test_a_swap_that_fails_leaves_what_there_was(tmp_path: Path) -> None:
    async def work() -> None:
        async with guest(tmp_path) as it:
            it.images.end(it.images.begin(DISK, "/a.img", moves=True), done=True)
            for image in ("/a.img", "/b.img"):
                it.images.end(it.images.begin(DISK, image, moves=True), done=False)
            assert await it.may() == ONE | {"/a.img": NAMED}

    run(work())


def test_where_nobody_knows_what_was_done_both_may_be_opened(tmp_path: Path) -> None:
    """The worker, or the supervisor, has ended meanwhile."""

    async def work() -> None:
        async with guest(tmp_path) as it:
            it.images.end(it.images.begin(DISK, "/a.img", moves=True), done=True)
            unfinished = it.images.begin(DISK, "/b.img", moves=True)
            assert it.kept() == {DISK: ["/a.img", "/b.img"]}
            it.images.end(unfinished, done=None)
            assert it.kept() == {DISK: ["/a.img", "/b.img"]}
            assert await it.may() == ONE | {"/a.img": NAMED, "/b.img": NAMED}
            it.images.end(it.images.begin(DISK, "/c.img", moves=True), done=True)
            assert it.kept() == {DISK: ["/c.img"]}

    run(work())


def test_of_two_swaps_at_once_neither_is_believed_to_be_the_last(tmp_path: Path) -> None:
    async def work() -> None:
        async with guest(tmp_path) as it:
            calls = [it.images.begin(DISK, image, moves=True) for image in ("/a.img", "/b.img")]
            for call in reversed(calls):
                it.images.end(call, done=True)
            assert set(await it.may()) == {"/1.img", "/a.img", "/b.img"}

    run(work())


def test_the_image_of_a_disk_that_goes_is_withdrawn(tmp_path: Path) -> None:
    async def work() -> None:
        async with guest(tmp_path) as it:
            detach = await it.attach("vdev=xvdb,target=/2.img")
            await it.images.confinable([1])
            before = it.images.withdrawals()
            await detach()
            await it.images.confinable([1])
            assert it.images.withdrawals() > before

    run(work())


def test_what_is_no_storage_hides_nothing_of_the_other_disks(tmp_path: Path) -> None:
    async def work() -> None:
        async with guest(tmp_path) as it:
            await it.attach("vdev=xvdb,target=nowhere:2")
            assert await it.images.confinable([1])
            assert await it.may() == ONE
            await it.attach("vdev=xvdc,target=rbd:pool/image")
            assert not await it.images.confinable([1])

    run(work())


def test_a_disk_that_goes_takes_its_images_with_it(tmp_path: Path) -> None:
    async def work() -> None:
        async with guest(tmp_path) as it:
            detach = await it.attach("vdev=xvdb,target=/2.img")
            it.images.end(it.images.begin(SECOND, "/moved.img", moves=True), done=True)
            assert set(await it.may()) == {"/1.img", "/2.img", "/moved.img"}
            before = it.images.withdrawals()
            await detach()
            assert await it.images.confinable([1])
            assert it.images.withdrawals() > before
            assert await it.may() == ONE
            assert it.kept() is None

    run(work())


def test_a_worker_of_one_domain_forgets_nothing_of_the_guests_other_one(tmp_path: Path) -> None:
    """A guest that migrates within its host is two domains for a while."""

    async def work() -> None:
        async with guest(tmp_path) as it:
            it.images.end(it.images.begin("2/51712", "/a.img", moves=True), done=True)
            assert await it.images.find([1]) == ONE | {"/a.img": NAMED}
            assert it.kept() == {"2/51712": ["/a.img"]}
            await it.images.confinable([1])  # which is all that it has by now
            assert it.kept() is None

    run(work())


def test_a_store_that_does_not_answer_takes_nothing_away(tmp_path: Path) -> None:
    async def work() -> None:
        async with disk_world(serve=False) as world:
            await world.guest()
            store = await world.dom0.xenstore()
            it = Guest(store, tmp_path)
            await it.attach("vdev=xvda,target=/1.img")
            it.images.end(it.images.begin(DISK, "/a.img", moves=True), done=True)
            await store.close()
            assert await it.images.confinable([1])
            assert await it.may() == {"/a.img": NAMED}
            assert it.kept() == {DISK: ["/a.img"]}

    run(work())


def test_a_guest_without_a_disk_has_nothing_the_next_time(tmp_path: Path) -> None:
    async def work() -> None:
        async with guest(tmp_path) as it:
            it.images.end(it.images.begin(DISK, "/a.img", moves=True), done=True)
            it.images.forget()
            assert it.kept() is None
            assert await it.again().find([1]) == ONE

    run(work())


def test_what_cannot_be_kept_is_not_begun(tmp_path: Path) -> None:
    async def work() -> None:
        async with guest(tmp_path / "none") as it:
            with pytest.raises(FileNotFoundError):
                it.images.begin(DISK, "/a.img", moves=True)
            assert await it.may() == ONE

    run(work())
