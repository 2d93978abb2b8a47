# SPDX-License-Identifier: Apache-2.0
"""The datapath plugin for xapi: each call's answer, and each mistake's text."""

import asyncio
import json
import os
from pathlib import Path

import pytest
from rig_disk import disk_world, run
from rig_xapi import Attached, Failed, Scripts, add, unplug
from xvd_process import Daemon, run_xvd

from xvd.blkif.assignment import parse_backend_assignment
from xvd.cli.methods import control_methods
from xvd.engines.uri import storage_uri
from xvd.errors import PeerClosed
from xvd.frontend.disk import Disk
from xvd.machine.emulated.link import LinkClient
from xvd.machine.emulated.service import MACHINE_SOCKET, connect
from xvd.toolstack import datapath
from xvd.toolstack.datapath import Code, Fault, Plugin, storage_of
from xvd.toolstack.vbd import Vbd, create_guest
from xvd.types import Domid

SIZE = 1 << 20
LUKS = b"LUKS\xba\xbe\0\2"


class Backend:
    """A daemon whose answers the test says."""

    def __init__(self, *kinds: str) -> None:
        self.serves = list(kinds)
        self.has: dict[int, list[str]] = {}
        self.down = 0

    async def kinds(self) -> list[str]:
        if self.down:
            self.down -= 1
            raise PeerClosed("no daemon")
        return self.serves

    async def images(self, domid: int) -> list[str]:
        await asyncio.sleep(0)
        return self.has.get(domid, [])


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a.img"
    path.touch()
    os.truncate(path, SIZE)
    return path


class Calls:
    """A plugin, called as by xapi."""

    def __init__(self, place: Path) -> None:
        self.kept = place / "datapath"
        self.backend = Backend("vbd3", "vbd")
        self.plugin = Plugin(self.kept, self.backend, "1.0")

    def __call__(self, name: str, **arguments: object) -> object:
        return run(self.plugin.call(name, json.dumps({"dbg": "", **arguments})))

    def fault(self, name: str, **arguments: object) -> Fault:
        with pytest.raises(Fault) as caught:
            self(name, **arguments)
        return caught.value


@pytest.fixture
def call(tmp_path: Path) -> Calls:
    return Calls(tmp_path)


def test_an_image_is_led_to_by_its_path_and_by_what_xvd_opens(call: Calls, image: Path) -> None:
    uri = f"xvd://{image}"

    answer = call("Datapath.attach", uri=uri, domain="7")

    assert answer == {
        "implementations": [
            ["XenDisk",
             {"backend_type": "vbd3", "params": uri, "extra": {"xvd-storage": str(image)}}],
            ["File", {"path": str(image)}],
        ]
    }  # fmt: skip


def test_what_dom0_cannot_open_has_no_path(call: Calls) -> None:
    answer = call("Datapath.attach", uri="xvd:nbd+unix:///e?socket=/run/n", domain="7")

    assert answer == {
        "implementations": [
            ["XenDisk",
             {"backend_type": "vbd3", "params": "xvd:nbd+unix:///e?socket=/run/n",
              "extra": {"xvd-storage": "nbd+unix:///e?socket=/run/n"}}],
        ]
    }  # fmt: skip


def test_an_image_behind_a_layer_has_no_path(call: Calls, image: Path) -> None:
    """dom0 would see the image, and not what its guest sees."""
    answer = call("Datapath.attach", uri=f"xvd:cow%7C{image}", domain="7")

    assert [name for name, _ in answer["implementations"]] == ["XenDisk"]  # type: ignore[index]


@pytest.mark.parametrize(
    ("uri", "storage"),
    [
        ("xvd:/a.img", "/a.img"),
        ("xvd:///a%20b.img", "/a b.img"),
        ("XVD:raw:/a.img", "raw:/a.img"),
        ("xvd:rbd:pool/image", "rbd:pool/image"),
        ("xvd:/a%2520.img", "/a%20.img"),
    ],
)
def test_the_storage_of_a_uri(uri: str, storage: str) -> None:
    assert storage_of(uri) == storage


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        ("vhd:///a", "'vhd:///a' is no URI of this plugin: write xvd:STORAGE"),
        ("xvd:", "'xvd:' is no URI of this plugin"),
        ("xvd:/a b", "and %20 for a space"),
        ("xvd://host/a", "'xvd://host/a' names a host; write xvd:///PATH"),
        ("xvd:/%C3%A4.img", "a disk's nodes hold printable ASCII"),
        ("xvd:/a%0A", "a disk's nodes hold printable ASCII"),
        (f"xvd:/{'a' * 2048}", "of at most 2048 characters"),
        ("xvd:zfs:pool/a", "xvd:zfs:pool/a: unknown storage 'zfs:pool/a'; there are"),
        ("xvd:a.img", "'a.img' is a relative path; write it from the root"),
        ("xvd:qcow2:a.img", "'qcow2:a.img' is a relative path; write it from the root"),
        ("xvd:rbd:", "'rbd:' names no storage"),
    ],
)
def test_a_uri_that_is_no_storage(call: Calls, uri: str, text: str) -> None:
    fault = call.fault("Datapath.attach", uri=uri, domain="7")

    assert fault.code == Code.BAD_URI
    assert text in str(fault)
    assert not list(call.kept.glob("*"))


def test_storage_that_is_not_there(call: Calls, tmp_path: Path) -> None:
    fault = call.fault("Datapath.attach", uri=f"xvd:{tmp_path}/none.img", domain="7")

    assert fault.code == Code.NO_STORAGE
    assert "none.img: no such image; make one: truncate -s 1G" in str(fault)


def test_an_image_that_is_a_container_is_refused_unless_it_is_said_to_be_raw(
    call: Calls, image: Path
) -> None:
    image.write_bytes(LUKS.ljust(SIZE, b"\0"))

    fault = call.fault("Datapath.attach", uri=f"xvd:{image}", domain="7")
    answer = call("Datapath.attach", uri=f"xvd:raw:{image}", domain="7")

    assert "serve that: luks:" in str(fault)
    assert answer["implementations"][1] == ["File", {"path": str(image)}]  # type: ignore[index]


def test_an_attach_again_answers_the_same_whatever_the_backend_serves_now(
    call: Calls, image: Path
) -> None:
    first = call("Datapath.attach", uri=f"xvd:{image}", domain="7")
    call.backend.serves = ["vbd"]

    assert call("Datapath.attach", uri=f"xvd:{image}", domain="7") == first
    assert len(list(call.kept.iterdir())) == 1


def test_a_detach_leaves_nothing_and_may_come_again(call: Calls, image: Path) -> None:
    use = {"uri": f"xvd:{image}", "domain": "7"}
    call("Datapath.open", uri=use["uri"], persistent=True)
    call("Datapath.attach", **use)
    call("Datapath.activate", **use)
    call("Datapath.deactivate", **use)

    assert [call("Datapath.detach", **use) for _ in range(2)] == [None, None]
    assert call("Datapath.close", uri=use["uri"]) is None
    assert not call.kept.exists()


@pytest.mark.parametrize("name", ["Datapath.activate", "Datapath.activate_readonly"])
def test_a_domain_that_has_not_attached_it(call: Calls, image: Path, name: str) -> None:
    call("Datapath.attach", uri=f"xvd:{image}", domain="7")

    fault = call.fault(name, uri=f"xvd:{image}", domain="8")

    assert fault.code == Code.NOT_ATTACHED
    assert str(fault) == (f"xvd:{image} is not attached for domain 8: call Datapath.attach first")


def test_deactivate_without_anything_before_it_is_nothing(call: Calls, image: Path) -> None:
    assert call("Datapath.deactivate", uri=f"xvd:{image}", domain="7") is None


def test_the_same_activation_again_is_the_same(call: Calls, image: Path) -> None:
    use = {"uri": f"xvd:{image}", "domain": "7"}
    call("Datapath.attach", **use)

    assert [call("Datapath.activate", **use) for _ in range(2)] == [None, None]


def test_reading_and_writing_exclude_each_other(call: Calls, image: Path) -> None:
    uri = f"xvd:{image}"
    for domain in ("7", "8"):
        call("Datapath.attach", uri=uri, domain=domain)
    call("Datapath.activate_readonly", uri=uri, domain="7")

    fault = call.fault("Datapath.activate", uri=uri, domain="8")
    call("Datapath.activate_readonly", uri=uri, domain="8")
    for domain in ("7", "8"):
        call("Datapath.deactivate", uri=uri, domain=domain)
    call("Datapath.activate", uri=uri, domain="8")

    assert fault.code == Code.IN_USE
    assert "is activated read-only for domain 7" in str(fault)
    assert "call Datapath.deactivate for that first" in str(fault)


def test_storage_that_cannot_be_written_is_for_reading(
    call: Calls, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the error of a read-only file system: root may write to a file of any mode."""
    use = {"uri": f"xvd:{image}", "domain": "7"}
    call("Datapath.attach", **use)
    plain = os.open

    def read_only(path: str, flags: int, *rest: int, **names: int) -> int:
        if path == str(image) and flags & os.O_ACCMODE == os.O_RDWR:
            raise OSError(30, os.strerror(30), path)
        return plain(path, flags, *rest, **names)

    monkeypatch.setattr(os, "open", read_only)

    fault = call.fault("Datapath.activate", **use)

    assert fault.code == Code.READ_ONLY
    assert "it lies on a read-only file system" in str(fault)
    assert "attach the volume read-only (VDI_ACTIVATE_READONLY)" in str(fault)
    assert call("Datapath.activate_readonly", **use) is None


def test_a_backend_that_is_being_restarted_is_waited_for(
    call: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datapath, "_AGAIN_S", 0)
    call.backend.down = 3

    assert call("Datapath.attach", uri="xvd:memory:1M", domain="7")


def test_without_a_backend_nothing_is_attached(
    call: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datapath, "BEGIN_S", 0)
    call.backend.down = 1 << 30

    fault = call.fault("Datapath.attach", uri="xvd:memory:1M", domain="7")

    assert fault.code == Code.NO_BACKEND
    assert "start it: systemctl start xvd-backend" in str(fault)


def test_storage_that_the_backend_still_has_is_waited_for(
    call: Calls, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use = {"uri": f"xvd:raw:{image}", "domain": "7"}
    call("Datapath.attach", **use)
    call("Datapath.activate", **use)
    call.backend.has = {7: [str(image)]}
    with monkeypatch.context() as patched:
        patched.setattr(datapath, "LET_GO_S", 0)
        fault = call.fault("Datapath.deactivate", **use)

    call.backend.has = {7: [], 8: [str(image)]}

    assert fault.code == Code.IN_USE
    assert "the backend has not let go of it for domain 7" in str(fault)
    assert call("Datapath.deactivate", **use) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "standard input is no JSON"),
        ("{", "standard input is no JSON"),
        ("[" * 100_000, "standard input is no JSON"),
        ('["xvd:/a"]', "give a JSON object of arguments"),
        ('{"uri": "xvd:/a"}', "the argument domain is missing; it has to be text"),
        ('{"uri": 7, "domain": "1"}', "the argument uri is 7; it has to be text"),
        ('{"uri": "", "domain": "1"}', "the argument uri is ''; it has to be text"),
    ],
)
def test_a_call_that_makes_no_sense(call: Calls, text: str, said: str) -> None:
    with pytest.raises(Fault) as caught:
        run(call.plugin.call("Datapath.detach", text))

    assert caught.value.code == Code.BAD_CALL
    assert said in str(caught.value)


def test_a_call_that_there_is_not(call: Calls) -> None:
    fault = call.fault("Data.mirror", uri="xvd:/a")

    assert fault.code == "Unimplemented"
    assert "there is no such call; there are datapath.activate, " in str(fault)


def test_what_is_not_to_stay_is_the_volume_plugins_affair(call: Calls) -> None:
    fault = call.fault("Datapath.open", uri="xvd:memory:1M", persistent=False)

    assert fault.code == Code.NOT_PERSISTENT


def test_the_query_has_what_xapi_reads(call: Calls) -> None:
    found = call("Plugin.query")

    assert isinstance(found, dict)
    assert found["plugin"] == "xvd"
    assert found["required_api_version"] == "5.0"
    assert {name for name, value in found.items() if not isinstance(value, str)} == {
        "features", "configuration", "required_cluster_stack",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("said", "opened"),
    [("/a.img", "/a.img"), ("raw:/a.img", "raw:/a.img"), ("qcow2:/a.q", "qcow2:/a.q")],
)
def test_what_the_storage_says_goes_before_params(said: str, opened: str) -> None:
    nodes = {
        "frontend": "/local/domain/7/device/vbd/51712", "frontend-id": "7", "params": "/b",
        "sm-data/xvd-storage": said,
    }  # fmt: skip

    assert storage_uri(parse_backend_assignment(nodes)) == opened


def test_a_guest_uses_what_xenopsd_has_attached_by_the_answer(call: Calls, image: Path) -> None:
    """The image is one that has to be said to be raw: only the storage's own node says so."""
    image.write_bytes(LUKS.ljust(SIZE, b"\0"))

    async def work() -> None:
        async with disk_world() as world:
            assert world.server is not None
            serves = control_methods(world.server)["kinds"]()
            assert isinstance(serves, list)
            call.backend.serves = serves
            await world.guest(1)
            use = json.dumps({"dbg": "", "uri": f"xvd:raw:{image}", "domain": "1"})
            answer = await call.plugin.call("Datapath.attach", use)
            await call.plugin.call("Datapath.activate", use)
            attached = Attached.of(answer)  # type: ignore[arg-type]
            vbd = await add(world.store, Vbd(Domid(1), 51712), attached)
            async with await world.open(vbd) as disk:
                assert await disk.read(0, 4) == LUKS[:4]
                await disk.write(512, b"x" * 512)
            await unplug(world.store, vbd)
            await call.plugin.call("Datapath.deactivate", use)
            await call.plugin.call("Datapath.detach", use)

    run(work())
    assert image.read_bytes()[512:1024] == b"x" * 512
    assert not call.kept.exists()


@pytest.mark.slow
def test_xapis_scripts_lead_a_guest_to_a_daemon_and_leave_nothing(
    tmp_path: Path, image: Path
) -> None:
    """Real processes: an emulated host, its backend, and a script for each call."""
    host = tmp_path / "host"
    scripts = Scripts(tmp_path, host)
    use = {"uri": f"xvd:{image}", "domain": "1"}

    async def in_the_guest() -> bytes:
        """What is on the image when deactivate has returned."""
        attached = Attached.of(await asyncio.to_thread(scripts.call, "Datapath.attach", **use))
        await asyncio.to_thread(scripts.call, "Datapath.activate", **use)
        dom0 = connect(host, Domid(0))
        link = LinkClient(host / MACHINE_SOCKET, Domid(0))
        link.create_domain(Domid(1))
        link.close()
        store = await dom0.xenstore()
        await create_guest(store, Domid(1), "guest")
        guest = connect(host, Domid(1))
        its = await guest.xenstore()
        vbd = await add(store, Vbd(Domid(1), 51712), attached)
        async with await Disk.open(guest, its, f"device/vbd/{vbd.vdev}") as disk:
            await disk.write(4096, b"y" * 4096)
            assert await disk.read(4096, 4096) == b"y" * 4096
        await unplug(store, vbd)
        await asyncio.to_thread(scripts.call, "Datapath.deactivate", **use)
        written = await asyncio.to_thread(image.read_bytes)
        await asyncio.to_thread(scripts.call, "Datapath.detach", **use)
        assert await store.ls("/local/domain/0/backend/vbd/1") == []
        await its.close()
        await store.close()
        guest.close()
        dom0.close()
        return written[4096:8192]

    bad = scripts.run("Datapath.attach", "nonsense")
    assert (bad.returncode, json.loads(bad.stdout)["code"]) == (1, "XVD_BAD_CALL")
    assert bad.stderr.startswith("xvd: Datapath.attach: standard input is no JSON")

    with Daemon("host", str(host)), Daemon("backend", "--host", str(host)):
        assert scripts.call("Plugin.Query")["name"] == "xvd"
        assert scripts.call("Datapath.open", uri=use["uri"], persistent=True) is None
        assert run(in_the_guest(), 60) == b"y" * 4096
        assert json.loads(run_xvd("stats", "--json", "--host", str(host)).stdout) == {
            "backend-0": []
        }
        assert not (host / "datapath").exists()
        with pytest.raises(Failed, match="XVD_NOT_ATTACHED: "):
            scripts.call("Datapath.activate", **use)


def test_without_the_program_the_script_says_so(tmp_path: Path) -> None:
    scripts = Scripts(tmp_path, tmp_path)
    (tmp_path / "bin" / "xvd").unlink()

    with pytest.raises(Failed, match="XVD_NOT_INSTALLED: the program xvd cannot be run"):
        scripts.call("Datapath.attach", uri="xvd:/a", domain="1")
