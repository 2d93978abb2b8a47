# SPDX-License-Identifier: Apache-2.0
"""What others wrote, against our xenstore: Debian's xenstore tools, Xen's own test, pyxs."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.tools

Tool = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def tool(xenstore, requires_tool) -> Tool:
    """Run a xenstore tool to its end, with its output."""

    def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [requires_tool(f"xenstore-{name}"), *arguments]
        return subprocess.run(
            command,
            env=xenstore.environment,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    return run


def test_write_and_read(tool: Tool) -> None:
    assert tool("write", "/a/b", "one", "/a/c", "two").returncode == 0
    assert tool("read", "/a/b", "/a/c").stdout == "one\ntwo\n"


def test_reading_nothing_fails(tool: Tool) -> None:
    result = tool("read", "/nothing")
    assert result.returncode == 1
    assert "couldn't read path /nothing" in result.stderr


def test_ls_shows_the_tree_with_permissions(tool: Tool) -> None:
    tool("write", "/a/b", "value")
    lines = tool("ls", "-fp", "/").stdout.splitlines()
    assert [line.split("   ")[0] for line in lines] == [
        '/tool = ""',
        '/tool/xenstored = ""',
        '/a = ""',
        '/a/b = "value"',
    ]
    assert all(line.endswith("(n0)") for line in lines)


DISK = "/local/domain/0/backend/vbd/1/51712"


@pytest.fixture
def block_xvd(xenstore, requires_tool) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Start the hotplug script as libxl does."""
    requires_tool("xenstore-exists")
    script = Path(__file__).parents[2] / "contrib/block-xvd"
    begun: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        environment = xenstore.environment | {"XENBUS_PATH": DISK}
        begun.append(
            subprocess.Popen([script, "add"], env=environment, stderr=subprocess.PIPE, text=True)
        )
        return begun[-1]

    yield start
    for one in begun:
        one.kill()
        one.communicate()


def test_the_hotplug_script_says_that_there_is_nothing_to_do(tool: Tool, block_xvd) -> None:
    tool("write", f"{DISK}/params", "aio:/a.img", f"{DISK}/state", "2")
    assert (block_xvd().communicate(timeout=30), tool("ls", DISK).stdout.splitlines()) == (
        (None, ""),
        [
            'params = "aio:/a.img"',
            'state = "2"',
            'physical-device-path = "/a.img"',
            'hotplug-status = "connected"',
        ],
    )


def test_the_hotplug_script_waits_for_storage_that_is_being_opened(tool: Tool, block_xvd) -> None:
    tool("write", f"{DISK}/params", "/a.img", f"{DISK}/state", "2", f"{DISK}/opening", "1")
    script = block_xvd()
    with pytest.raises(subprocess.TimeoutExpired):
        script.wait(1)
    tool("rm", f"{DISK}/opening")
    assert script.wait(30) == 0
    assert tool("read", f"{DISK}/hotplug-status").stdout == "connected\n"


def test_the_hotplug_script_tells_why_there_is_no_storage(tool: Tool, block_xvd) -> None:
    why = "cannot open '/a.img': no such image"
    error = "/local/domain/0/error/backend/vbd/1/51712/error"
    tool("write", f"{DISK}/params", "/a.img", f"{DISK}/state", "5", error, why)
    script = block_xvd()
    assert script.communicate(timeout=30) == (None, f"{why}\n")
    assert script.returncode == 1
    names = [f"{DISK}/hotplug-status", f"{DISK}/hotplug-error"]
    assert tool("read", *names).stdout == f"error\n{why}\n"


def test_list_names_children(tool: Tool) -> None:
    for name in ("one", "two"):
        tool("write", f"/a/{name}", "")
    assert tool("list", "/a").stdout == "one\ntwo\n"


def test_list_of_a_directory_larger_than_a_message(xenstore, tool: Tool) -> None:
    names = [f"child-{index:04}" for index in range(600)]
    arguments = [text for name in names for text in (f"/d/{name}", "")]
    tool("write", *arguments)
    assert tool("list", "/d").stdout.splitlines() == names


def test_exists(tool: Tool) -> None:
    assert [tool("exists", path).returncode for path in ("/tool", "/nothing")] == [0, 1]


def test_rm(tool: Tool) -> None:
    tool("write", "/a/b", "")
    assert tool("rm", "/a").returncode == 0
    assert tool("exists", "/a").returncode == 1


def test_chmod(tool: Tool) -> None:
    tool("write", "/a/b", "")
    assert tool("chmod", "-r", "/a", "n1", "r2").returncode == 0
    assert [line.split()[-1] for line in tool("ls", "-p", "/a").stdout.splitlines()] == ["(n1,r2)"]


def test_watch_prints_what_changes(xenstore, tool: Tool, requires_tool) -> None:
    watcher = subprocess.Popen(
        [requires_tool("xenstore-watch"), "-n", "3", "/a"],
        env=xenstore.environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    xenstore.wait_for_watches(1)
    tool("write", "/a/b", "value")
    tool("rm", "/a")
    assert watcher.communicate(timeout=30)[0] == "/a\n/a/b\n/a\n"


def test_control_check(tool: Tool, xenstore, requires_tool) -> None:
    control = requires_tool("/usr/lib/xen-*/bin/xenstore-control")
    result = subprocess.run(
        [control, "check"], env=xenstore.environment, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (0, "OK\n")


@pytest.mark.slow
@pytest.mark.parametrize("options", [["-i", "100"], ["-r", "1"]], ids=["each-100-times", "random"])
def test_xens_own_test_passes(xenstore, requires_tool, options: list[str]) -> None:
    program = requires_tool("/usr/lib/xen-*/bin/test-xenstore")
    result = subprocess.run(
        [program, *options],
        env=xenstore.environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    if options[0] == "-i":
        assert result.stdout.count(": avg:") == 12
    assert xenstore.store.counts.transactions == 0


@pytest.fixture
def pyxs():
    try:
        import pyxs
    except ImportError:
        reason = "pyxs is missing: install the development dependencies"
        if os.environ.get("XVD_REQUIRE_TOOLS") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return pyxs


def test_pyxs_reads_writes_and_lists(xenstore, pyxs) -> None:
    with pyxs.Client(unix_socket_path=str(xenstore.path)) as client:
        client.write(b"/a/b", b"value")
        client.set_perms(b"/a/b", [b"b0", b"r1"])
        assert (client.read(b"/a/b"), client.list(b"/a")) == (b"value", [b"b"])
        assert client.get_perms(b"/a/b") == [b"b0", b"r1"]
        assert (client.exists(b"/a"), client.exists(b"/x")) == (True, False)
        client.delete(b"/a")
        with pytest.raises(pyxs.PyXSError):
            client.read(b"/a/b")


def test_pyxs_transactions_and_domains(xenstore, pyxs) -> None:
    with pyxs.Client(unix_socket_path=str(xenstore.path)) as client:
        client.transaction()
        client.write(b"/a", b"1")
        assert client.commit()
        client.transaction()
        client.write(b"/a", b"2")
        client.rollback()
        client.introduce_domain(5, 0, 9)
        assert client.read(b"/a") == b"1"
        assert client.is_domain_introduced(5)
        assert client.get_domain_path(5) == b"/local/domain/5"


def test_pyxs_watches(xenstore, pyxs) -> None:
    with pyxs.Client(unix_socket_path=str(xenstore.path)) as client:
        monitor = client.monitor()
        monitor.watch(b"/a", b"token")
        events = monitor.wait()
        first = next(events)
        client.write(b"/a/b", b"1")
        assert [tuple(first), tuple(next(events))] == [(b"/a", b"token"), (b"/a/b", b"token")]
        monitor.close()
