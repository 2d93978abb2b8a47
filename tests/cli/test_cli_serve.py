# SPDX-License-Identifier: Apache-2.0
"""What users of nbdkit and qemu-nbd are used to, by ``xvd serve`` and ``xvd nbd``."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest
from tls_files import make_credentials
from xvd_process import Daemon, FourProcesses, run_xvd

pytestmark = pytest.mark.slow

SHOW = 'echo "$uri" "$unixsocket" "$nbd" "<$port>" "<$exportname>" "<$tls>"'


def said(*arguments: str) -> tuple[int, str, str]:
    result = run_xvd(*arguments)
    return result.returncode, result.stdout, result.stderr


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "a.img", tmp_path / "b.img"]
    for number, path in enumerate(paths, 1):
        path.write_bytes(bytes([number]) * (number << 20))
    return paths


# ---- What --run is told ----


def test_run_is_told_where_the_disk_is(tmp_path: Path) -> None:
    socket = tmp_path / "s"

    outcome = said("serve", "null:1M", "-U", str(socket), "--run", SHOW)

    where = f"{socket} nbd:unix:{socket}"
    assert outcome == (0, f"nbd+unix:///?socket={quote(str(socket))} {where} <> <> <>\n", "")


def test_run_is_told_of_tcp_and_of_the_exports_name() -> None:
    status, output, complaint = said("serve", "null:1M", "--tcp", "0", "-e", "d", "--run", SHOW)

    shown = (
        r"nbd://127\.0\.0\.1:(\d+)/d \S+/nbd\.sock nbd:127\.0\.0\.1:\1:exportname=d <\1> <d> <>\n"
    )
    assert (status, complaint) == (0, "")
    assert re.fullmatch(shown, output)


@pytest.mark.parametrize("variable", ["nbd", "uri"])
def test_what_run_is_told_is_what_qemu_takes(
    variable: str, images: list[Path], requires_tool: Callable[[str], str]
) -> None:
    command = f"{requires_tool('qemu-img')} compare -f raw ${variable} {images[0]}"

    for more in ([], ["--tcp", "0"], ["-e", "name"]):
        outcome = said("serve", str(images[0]), "-r", *more, "--run", command)

        assert outcome == (0, "Images are identical.\n", "")


def test_a_hyphen_is_a_private_socket(tmp_path: Path) -> None:
    status, output, _ = said("serve", "null:1M", "-U", "-", "--run", 'echo "$unixsocket"; ls')

    assert status == 0
    assert re.match(r"\S+/xvd-\S+/nbd\.sock\n", output)
    assert not Path("-").exists()


# ---- Several images ----


def test_several_images_are_exports_by_their_names(
    images: list[Path], requires_tool: Callable[[str], str]
) -> None:
    command = f"{requires_tool('nbdinfo')} --list --json $uri"

    status, output, complaint = said("serve", *map(str, images), "--run", command)

    exports = {it["export-name"]: it["export-size"] for it in json.loads(output)["exports"]}
    assert (status, exports, complaint) == (0, {"a.img": 1 << 20, "b.img": 2 << 20}, "")


def test_several_images_are_disks_of_their_own(
    images: list[Path], requires_tool: Callable[[str], str]
) -> None:
    qemu_io = requires_tool("qemu-io")
    place = 'nbd+unix:///two?socket="$unixsocket"'
    command = f'{qemu_io} -f raw -c "read -P 2 0 2M" -c "write -P 9 4K 4K" -c flush {place}'

    status, output, _ = said(
        "serve", *map(str, images), "-e", "one", "-e", "two", "--report", "--run", command
    )

    assert (status, "wrote 4096/4096" in output, "Pattern" in output) == (0, True, False)
    assert images[1].read_bytes() == b"\2" * 4096 + b"\x09" * 4096 + b"\2" * ((2 << 20) - 8192)
    assert images[0].read_bytes() == b"\1" * (1 << 20)


def test_an_image_is_several_disks_that_only_read(images: list[Path]) -> None:
    twice = str(images[0]), str(images[0])

    assert said("serve", "-r", *twice, "-e", "a", "-e", "b", "--run", "true") == (0, "", "")


def test_without_run_every_exports_uri_is_printed(images: list[Path], tmp_path: Path) -> None:
    socket = tmp_path / "s"
    with Daemon("serve", *map(str, images), "--socket", str(socket)) as daemon:
        second = daemon._output.readline().strip()

        assert daemon.stop() == 0
    where = quote(str(socket))
    assert (daemon.line, second) == (
        f"nbd+unix:///a.img?socket={where}", f"nbd+unix:///b.img?socket={where}",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["null:1M", "null:1M"], "two exports would be called '1M'; name them: --export-name"),
        (["null:1M", "null:2M", "-e", "a"],
         "2 images and 1 names; give one --export-name for each"),
        (["null:1M", "-e", "a", "-e", "b"],
         "1 images and 2 names; give one --export-name for each"),
        (["null:1M", "null:2M", "--vdev", "xvdb"],
         "--vdev names one disk; several are xvda, xvdb and so on"),
        ([f"null:{n}M" for n in range(1, 18)],
         "17 images; 16 are the most that one guest is given here"),
        (["/a.img", "raw:/../a.img", "-e", "a", "-e", "b"],
         "raw:/../a.img is named twice, and one disk at a time may write to it; name it once, as "
         "any number of clients may share a disk, or serve all of them read-only: -r"),
        (["null:1M", "--tcp", "99999"],
         "'99999': there is no port 99999; ports go from 0 to 65535"),
        (["null:1M", "--tcp", "localhost:http"],
         "'localhost:http' is no address; write HOST:PORT, or PORT for loopback"),
        (["null:1M", "--tls-creds", "x"], "--tls-creds is for TCP; say where: --tcp PORT"),
        (["null:1M", "--tcp", "0", "--tls-verify-peer"],
         "--tls-verify-peer needs --tls-creds DIR"),
        (["null:1M", "--tcp", "0", "--tls-creds", "/none"],
         "/none/server-cert.pem: no such file; TLS needs server-cert.pem, server-key.pem"),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_refused(words: list[str], text: str) -> None:
    assert said("serve", *words, "--run", "true") == (2, "", f"xvd: {text}\n")


# ---- The life of a daemon ----


def test_a_pidfile_is_there_while_the_disk_is_served(tmp_path: Path) -> None:
    pidfile = tmp_path / "pid"
    with Daemon("serve", "null:1M", "--pidfile", str(pidfile)) as daemon:
        written = pidfile.read_text()

        assert daemon.stop() == 0
    assert written == f"{daemon.process.pid}\n"
    assert not pidfile.exists()


def test_a_pidfile_that_cannot_be_written_is_said_to_be(tmp_path: Path) -> None:
    outcome = said("serve", "null:1M", "-P", str(tmp_path / "no" / "pid"), "--run", "echo ran")

    assert outcome == (1, "", f"xvd: {tmp_path}/no/pid: No such file or directory\n")


def test_it_ends_with_its_parent(tmp_path: Path) -> None:
    """The shell starts it, waits until it serves, and is killed."""
    pidfile = tmp_path / "pid"
    shell = (
        f"{sys.executable} -m xvd.cli serve null:1M --exit-with-parent --pidfile {pidfile} & "
        'read line; kill -KILL "$$"'
    )
    parent = subprocess.Popen(
        ["sh", "-c", shell], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdin is not None
    assert parent.stdout is not None
    uri = parent.stdout.readline()
    served = os.pidfd_open(int(pidfile.read_text()))

    parent.stdin.write("\n")
    parent.stdin.flush()

    assert (uri[:9], parent.stdout.read()) == ("nbd+unix:", "")  # nobody has the pipe any more
    assert parent.wait() == -9
    os.close(served)
    assert not pidfile.exists()
    parent.stdin.close()
    parent.stdout.close()


def test_format_has_a_short_name(images: list[Path], requires_tool: Callable[[str], str]) -> None:
    command = f"{requires_tool('qemu-img')} info $uri"

    status, output, _ = said("serve", "-f", "raw", str(images[0]), "--run", command)

    assert (status, "virtual size: 1 MiB" in output) == (0, True)


def test_a_guests_disk_is_exported_in_the_same_words(
    tmp_path: Path, images: list[Path], requires_tool: Callable[[str], str]
) -> None:
    with FourProcesses(tmp_path, images[0]) as four:
        four.nbd.stop()
        command = f"{requires_tool('nbdinfo')} --size $uri; {SHOW}"

        outcome = four.run(
            "nbd", "1", "xvda", "-e", "guest", "-U", str(four.socket), "--run", command
        )

    where = quote(str(four.socket))
    assert (outcome.returncode, outcome.stdout.splitlines()) == (
        0,
        [
            str(1 << 20),
            f"nbd+unix:///guest?socket={where} {four.socket} "
            f"nbd:unix:{four.socket}:exportname=guest <> <guest> <>",
        ],
    )


# ---- TLS ----


@pytest.fixture(scope="session")
def credentials(
    tmp_path_factory: pytest.TempPathFactory, requires_tool: Callable[[str], str]
) -> Path:
    """Ours, and in ``other`` those of another authority."""
    openssl = requires_tool("openssl")
    directory = make_credentials(openssl, tmp_path_factory.mktemp("tls"))
    make_credentials(openssl, directory / "other")
    return directory


def test_nbdinfo_finds_the_disk_by_tls(
    credentials: Path, requires_tool: Callable[[str], str]
) -> None:
    nbdinfo = requires_tool("nbdinfo")
    words = ("--tcp", "0", "--tls-creds", str(credentials), "--tls-verify-peer")

    status, output, complaint = said(
        "serve", "null:3M", *words, "--run",
        f'{nbdinfo} --size "$uri?tls-certificates={credentials}"; {SHOW}',
    )  # fmt: skip

    size, shown = output.splitlines()
    assert (status, size, complaint) == (0, str(3 << 20), "")
    assert re.match(r"nbds://127\.0\.0\.1:\d+/ .* <require>$", shown)


def test_qemu_img_reads_and_writes_by_tls(
    credentials: Path, images: list[Path], tmp_path: Path, requires_tool: Callable[[str], str]
) -> None:
    """Many megabytes each way, through both buffers of TLS."""
    qemu_img, target = requires_tool("qemu-img"), tmp_path / "target.img"
    source = tmp_path / "source.img"
    source.write_bytes(os.urandom(24 << 20))
    target.write_bytes(bytes(24 << 20))
    where = "driver=nbd,host=127.0.0.1,port=$port,tls-creds=t"
    creds = f"--object tls-creds-x509,id=t,dir={credentials},endpoint=client"
    script = (
        f"{qemu_img} convert -n {creds} --target-image-opts {source} -f raw {where} && "
        f"{qemu_img} compare {creds} --image-opts driver=file,filename={source} {where}"
    )

    outcome = said(
        "serve", str(target), "--tcp", "0", "--tls-creds", str(credentials), "--run", script
    )

    assert outcome == (0, "Images are identical.\n", "")
    assert target.read_bytes() == source.read_bytes()


def test_a_client_without_tls_is_told_nothing(
    credentials: Path, requires_tool: Callable[[str], str]
) -> None:
    nbdinfo = requires_tool("nbdinfo")
    script = (
        f"{nbdinfo} --size nbd://127.0.0.1:$port/; {nbdinfo} --size nbd+unix://?socket=$unixsocket"
    )

    _, output, complaint = said(
        "serve", "null:3M", "--tcp", "0", "--tls-creds", str(credentials), "--run", script
    )

    assert output == f"{3 << 20}\n"  # the unix socket's alone, which is only ours
    assert "TLS" in complaint


@pytest.mark.parametrize(("known", "size"), [("", f"{3 << 20}\n"), ("other", "")])
def test_only_a_client_with_a_certificate_is_let_in_where_that_is_demanded(
    known: str, size: str, credentials: Path, tmp_path: Path, requires_tool: Callable[[str], str]
) -> None:
    """The stranger knows the server's authority, and has a certificate of another one."""
    nbdinfo, theirs = requires_tool("nbdinfo"), tmp_path / "client"
    theirs.mkdir()
    (theirs / "ca-cert.pem").write_bytes((credentials / "ca-cert.pem").read_bytes())
    for name in ("client-cert.pem", "client-key.pem"):
        (theirs / name).write_bytes((credentials / known / name).read_bytes())
    words = ("--tcp", "0", "--tls-creds", str(credentials), "--tls-verify-peer")

    _, output, _ = said(
        "serve", "null:3M", *words, "--run",
        f'{nbdinfo} --size "$uri?tls-certificates={theirs}"',
    )  # fmt: skip

    assert output == size


def test_credentials_that_are_none_are_refused(tmp_path: Path) -> None:
    for name in ("server-cert.pem", "server-key.pem"):
        (tmp_path / name).write_text("nothing\n")

    status, output, complaint = said(
        "serve", "null:1M", "--tcp", "0", "--tls-creds", str(tmp_path), "--run", "true"
    )

    assert (status, output) == (2, "")
    assert complaint.startswith(f"xvd: {tmp_path}: no credentials for TLS: ")


def test_known_clients_may_come_from_elsewhere(credentials: Path) -> None:
    words = ("--tcp", "0.0.0.0:0", "--tls-creds", str(credentials))

    refused = said("serve", "null:1M", *words, "--run", "true")
    taken = said("serve", "null:1M", *words, "--tls-verify-peer", "--run", "true")

    assert (refused[0], taken) == (2, (0, "", ""))
    assert refused[2] == (
        "xvd: 0.0.0.0:0: TLS without --tls-verify-peer lets anybody in: whoever reaches the port "
        "owns the disk; export on loopback, or say --allow-remote\n"
    )


# ---- Completion ----


def completed(line: str, **variables: str) -> list[str]:
    """What a shell offers behind the last word of a line."""
    result = subprocess.run(
        [Path(sys.executable).parent / "xvd"],
        check=False, capture_output=True, text=True,
        env={**os.environ, "_XVD_COMPLETE": "complete_bash", "COMP_WORDS": line,
             "COMP_CWORD": str(line.count(" ")), **variables},
    )  # fmt: skip
    return result.stdout.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("xvd snap", ["snapshot"]),
        ("xvd serve --layer d", ["detect-zeroes:", "delay:"]),
        ("xvd serve --layer read", ["readonly"]),
        ("xvd serve a.img --layer delay:read=1ms,f", ["delay:read=1ms,flush="]),
        ("xvd serve --set trus", ["trusted="]),
        ("xvd nbd --set max_q", ["max_queues="]),
        ("xvd set total_iops_sec", ["total_iops_sec=", "total_iops_sec_max=",
                                    "total_iops_sec_max_length="]),
        ("xvd detach --host /nowhere ", []),
    ],
)  # fmt: skip
def test_a_shell_is_told_what_may_follow(line: str, offered: list[str]) -> None:
    assert completed(line) == offered


def test_a_shell_is_told_which_disks_there_are(tmp_path: Path, images: list[Path]) -> None:
    with FourProcesses(tmp_path, images[0]) as four:
        four.run("attach", "12", "vdev=xvdb,target=null:1M")
        host = {"XVD_HOST": str(four.directory)}

        guests = completed("xvd detach ", **host)
        disks = completed("xvd detach 12 ", **host)
        named = completed(f"xvd set --host {four.directory} --disk 1")

    assert (guests, disks, named) == (["1", "12"], ["xvdb"], ["1/xvda", "12/xvdb"])
