# SPDX-License-Identifier: Apache-2.0
"""A Ceph cluster of one monitor and one OSD in a directory, for tests; ready in some seconds.

``python tests/support/ceph.py NEW-DIRECTORY COMMAND...`` runs a measurement beside one:
``xvd bench cluster --out docs/benchmarks.md``.
"""

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_CONF = """
[global]
fsid = {fsid}
mon_host = [v2:127.0.0.1:{port}/0,v1:127.0.0.1:{other}/0]
public_network = 127.0.0.0/8
ms_bind_ipv6 = false
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
auth_allow_insecure_global_id_reclaim = false
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 8
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
osd_objectstore = memstore
memstore_device_bytes = 1073741824
osd_class_load_list = *
osd_class_default_list = *
mon_allow_pool_size_one = true
mon_warn_on_pool_no_redundancy = false
mon_data = {place}/mon
osd_data = {place}/osd
crash_dir = {place}
run_dir = {place}
keyring = {place}/keyring
admin_socket = {place}/$name.asok
pid_file = {place}/$name.pid
log_file = {place}/$name.log
"""
POOL = "rbd"
_PROGRAMS = ("ceph-mon", "ceph-osd", "ceph", "rbd", "monmaptool", "ceph-authtool")


def _free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as other:
        for each in (one, other):
            each.bind(("127.0.0.1", 0))
        return one.getsockname()[1], other.getsockname()[1]


class Cluster:
    """Running since it was made, until `stop`. What is in it is in the OSD's memory."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.conf = place / "ceph.conf"
        fsid, self._osd = str(uuid.uuid4()), str(uuid.uuid4())
        port, other = _free_ports()
        text = _CONF.format(fsid=fsid, place=place, port=port, other=other)
        self.conf.write_text(text)
        for name in ("mon", "osd"):
            (place / name).mkdir()
        self._start_monitor(fsid, port, other)
        self.run("ceph", "osd", "new", self._osd)
        self.run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", self._osd)
        self.run("ceph-osd", "-i", "0")
        self._wait_for_osd()
        self.run("ceph", "osd", "pool", "create", POOL, "8", "8")
        self.run("rbd", "pool", "init", POOL)

    def _start_monitor(self, fsid: str, port: int, other: int) -> None:
        keyring, monmap = self.place / "keyring", self.place / "monmap"
        caps = ["--cap", "mon", "allow *"]
        for words in (
            ["--create-keyring", "-n", "mon.", *caps],
            ["-n", "client.admin", *caps, "--cap", "osd", "allow *"],
        ):
            self.run("ceph-authtool", str(keyring), "--gen-key", *words)
        at = f"[v2:127.0.0.1:{port},v1:127.0.0.1:{other}]"
        self.run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", at, str(monmap))
        for words in (["--mkfs", "--monmap", str(monmap), "--keyring", str(keyring)], []):
            self.run("ceph-mon", "-i", "a", *words)

    def _wait_for_osd(self) -> None:
        deadline = time.monotonic() + 60
        while "1 up" not in self.run("ceph", "osd", "stat"):
            assert time.monotonic() < deadline, "the OSD does not come up"
            time.sleep(0.2)

    def run(self, *words: str) -> str:
        """Run one of Ceph's programs for this cluster; what it prints."""
        done = subprocess.run(
            [*words, "--conf", str(self.conf)], check=False, capture_output=True, text=True,
            timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def image(self, name: str, size: int, *words: str) -> str:
        """Make an image of `size` bytes, with more words for `rbd create`; its URI."""
        self.run("rbd", "create", "--size", f"{size}B", *words, f"{POOL}/{name}")
        return f"rbd:{POOL}/{name},conf={self.conf}"

    @property
    def osd(self) -> int:
        """The OSD's process."""
        return int((self.place / "osd.0.pid").read_text())

    def stop(self) -> None:
        """End it at once."""
        for daemon in ("osd.0", "mon.a"):
            pid = int((self.place / f"{daemon}.pid").read_text())
            os.kill(pid, signal.SIGKILL)


@contextmanager
def running_cluster(place: Path, requires_tool: Callable[[str], str]) -> Iterator[Cluster]:
    """A cluster in a new directory, or a test that is skipped for want of Ceph."""
    for program in _PROGRAMS:
        requires_tool(program)
    place.mkdir()
    cluster = Cluster(place)
    try:
        yield cluster
    finally:
        cluster.stop()


def main() -> int:
    """Run a command beside a cluster that has two images, for `xvd bench cluster`."""
    place, *command = sys.argv[1:]
    with running_cluster(Path(place), lambda program: program) as cluster:
        for name in ("read", "write"):
            cluster.image(name, 64 << 20)
        images = f"{POOL}/read,{POOL}/write"
        variables = {"CEPH_CONF": str(cluster.conf), "XVD_BENCH_RBD": images}
        return subprocess.run(command, check=False, env={**os.environ, **variables}).returncode


if __name__ == "__main__":
    sys.exit(main())
