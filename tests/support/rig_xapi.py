# SPDX-License-Identifier: Apache-2.0
"""What xapi and xenopsd do with a datapath plugin: they run its scripts, and write a disk's nodes.

By xen-api's ocaml/xapi-storage-script/main.ml, and device.ml and xenops_server_xen.ml of
ocaml/xenopsd/xc.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xvd.blkif.vdev import format_vdev
from xvd.machine.xs import requests
from xvd.machine.xs.client import Transaction, XenstoreClient
from xvd.toolstack.vbd import Vbd

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "contrib" / "xapi" / "xvd-datapath"
LINKS = ROOT / "debian" / "xvd.links"


class Failed(Exception):
    """A call that failed as xapi understands it: code, params and backtrace."""

    def __init__(self, printed: dict[str, Any]) -> None:
        assert printed.keys() == {"code", "params", "backtrace"}
        assert printed["backtrace"].keys() == {"error", "files", "lines"}
        [text] = printed["params"]
        super().__init__(f"{printed['code']}: {text}")
        self.code = printed["code"]


class Scripts:
    """The plugin's directory, as the package makes it, and its scripts as xapi runs them."""

    def __init__(self, place: Path, host: Path) -> None:
        self.directory = place / "datapath" / "xvd"
        self.directory.mkdir(parents=True)
        for line in LINKS.read_text().splitlines():
            (self.directory / Path(line.split()[1]).name).symlink_to(SCRIPT)
        program = place / "bin" / "xvd"
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -m xvd.cli "$@"\n')
        program.chmod(0o755)
        self._environment = os.environ | {
            "PATH": f"{program.parent}:/usr/bin:/bin", "XVD_HOST": str(host),
        }  # fmt: skip

    def run(self, name: str, text: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.directory / name, "--json"], check=False, capture_output=True, text=True,
            input=text, env=self._environment, timeout=100,
        )  # fmt: skip

    def call(self, name: str, **arguments: object) -> Any:
        """What a call returns; raises `Failed`."""
        done = self.run(name, json.dumps({"dbg": "a test", **arguments}))
        printed = json.loads(done.stdout)
        if done.returncode != 0:
            raise Failed(printed)
        return printed


@dataclass(slots=True)
class Attached:
    """What xenopsd takes from an attach: `params_of_backend`."""

    kind: str
    params: str
    nodes: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, answer: dict[str, Any]) -> "Attached":
        found = dict(answer["implementations"])
        disk = found["XenDisk"]
        local = next((found[name] for name in ("BlockDevice", "File") if name in found), None)
        params = "" if local is None else local["path"]
        nodes = {"sm-data/backend-kind": disk["backend_type"]}
        nodes |= {f"sm-data/{name}": text for name, text in disk["extra"].items()}
        if local is None:
            nodes["qemu-params"] = disk["params"]
        return cls(disk["backend_type"], params, nodes)


async def add(store: XenstoreClient, vbd: Vbd, attached: Attached, mode: str = "w") -> Vbd:
    """Write the nodes of a disk as xenopsd does (`add_async`, `add_device`); vbd: which."""
    vbd = Vbd(vbd.domid, vbd.vdev, vbd.backend_domid, attached.kind)
    back = attached.nodes | {
        "frontend": vbd.frontend, "frontend-id": str(vbd.domid), "online": "1", "removable": "1",
        "state": "1", "dev": format_vdev(vbd.vdev), "type": "phy", "mode": mode,
        "params": attached.params,
    }  # fmt: skip
    front = {
        "backend": vbd.backend, "backend-id": str(vbd.backend_domid), "state": "1",
        "virtual-device": str(vbd.vdev), "device-type": "disk",
    }  # fmt: skip

    async def work(tx: Transaction) -> None:
        for path, perms, nodes in (
            (vbd.frontend, [f"n{vbd.domid}", f"r{vbd.backend_domid}"], front),
            (vbd.backend, [f"n{vbd.backend_domid}", f"r{vbd.domid}"], back),
        ):
            await tx.ask_all([requests.mkdir(path), requests.set_perms(path, perms)])
            await tx.ask_all([requests.write(f"{path}/{name}", nodes[name]) for name in nodes])

    await store.transact(work)
    return vbd


async def unplug(store: XenstoreClient, vbd: Vbd) -> None:
    """Take a disk away as `clean_shutdown` and `release` do: they wait for the frontend only."""
    await store.write(f"{vbd.backend}/online", "0")
    await store.write(f"{vbd.backend}/state", "5")
    async with await store.watch(f"{vbd.frontend}/state") as watch:
        async for _ in watch:
            if await store.try_read(f"{vbd.frontend}/state") in (None, "6", "1"):
                break
    await store.rm_each([vbd.frontend, vbd.backend])
