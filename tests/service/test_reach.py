# SPDX-License-Identifier: Apache-2.0
"""Which files a worker may open: decided by name and flags."""

import os

import pytest

from xvd.service.sandbox.reach import Image, Way, decide

OWN = frozenset({"/run/xvd/state/backend-0/1"})
IMAGES = {
    "/images/a.img": Image(writable=True),
    "/images/golden.img": Image(writable=False),
    "/images/changes": Image(writable=True, made=True),
}
READ, BOTH = os.O_RDONLY, os.O_RDWR
MAKE = os.O_RDWR | os.O_CREAT


@pytest.mark.parametrize(
    ("path", "flags", "way"),
    [
        ("/images/a.img", READ, Way.HAND_OVER),
        ("/images/a.img", BOTH | os.O_DIRECT | os.O_CLOEXEC, Way.HAND_OVER),
        ("/images/a.img", BOTH | os.O_EXCL, Way.HAND_OVER),
        ("/images/a.img", BOTH | os.O_TRUNC, Way.REFUSE),
        ("/images/a.img", os.O_WRONLY | os.O_APPEND, Way.REFUSE),
        ("/images/a.img", MAKE, Way.REFUSE),
        ("/images/a.img/x", READ, Way.REFUSE),
        ("/images/b.img", READ, Way.REFUSE),
        ("/images/golden.img", READ, Way.HAND_OVER),
        ("/images/golden.img", BOTH, Way.REFUSE),
        ("/images/golden.img", os.O_WRONLY, Way.REFUSE),
        ("/images/changes", MAKE | os.O_NOFOLLOW, Way.HAND_OVER),
        ("/images/changes", MAKE | os.O_TRUNC, Way.REFUSE),
        ("/images", os.O_TMPFILE | BOTH, Way.REFUSE),
        ("/run/xvd/state/backend-0/1", READ | os.O_DIRECTORY, Way.LEAVE),
        ("/run/xvd/state/backend-0/1/vbd-1-51712-q0.ring", MAKE | os.O_EXCL, Way.LEAVE),
        ("/run/xvd/state/backend-0/1/x/y", READ, Way.REFUSE),
        ("/run/xvd/state/backend-0/2", READ, Way.REFUSE),
        ("/run/xvd/state/backend-0/12", READ, Way.REFUSE),
        ("/dev/null", BOTH, Way.HAND_OVER),
        ("/dev/xen/gntdev", BOTH, Way.HAND_OVER),
        ("/dev/xen/evtchn", BOTH, Way.HAND_EVTCHN),
        ("/dev/xen/privcmd", BOTH, Way.REFUSE),
        ("/dev/sda", READ, Way.REFUSE),
        ("/proc/meminfo", READ, Way.HAND_PUBLIC),
        ("/proc/pressure/memory", BOTH, Way.HAND_OVER),
        ("/proc/1/environ", READ, Way.REFUSE),
        ("/proc/1/mem", READ, Way.REFUSE),
        ("/proc/self/mem", BOTH, Way.REFUSE),
        ("/proc/self/environ", READ, Way.REFUSE),
        ("/proc/sys/kernel/core_pattern", READ, Way.HAND_PUBLIC),
        ("/proc/sys/kernel/core_pattern", os.O_WRONLY, Way.REFUSE),
        ("/sys/block", READ | os.O_DIRECTORY, Way.HAND_PUBLIC),
        ("/sys/power/state", os.O_WRONLY, Way.REFUSE),
        (os.__file__, READ, Way.HAND_PUBLIC),
        ("/etc/passwd", READ, Way.REFUSE),
        ("/etc/xen/xl.conf", READ, Way.REFUSE),
    ],
)  # fmt: skip
def test_a_worker_opens(path: str, flags: int, way: Way) -> None:
    assert decide(path, flags, pid=7, own=OWN, images=IMAGES).way is way


@pytest.mark.parametrize(
    ("path", "opened"),
    [
        ("/proc/self/maps", "/proc/7/maps"),
        ("/proc/self/fd/3", "/proc/7/fd/3"),
        ("/proc/self/fd", "/proc/7/fd"),
        ("/images/a.img", "/images/a.img"),
    ],
)
def test_itself_is_the_worker(path: str, opened: str) -> None:
    assert decide(path, READ, pid=7, own=OWN, images=IMAGES).path == opened
