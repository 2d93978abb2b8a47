# SPDX-License-Identifier: Apache-2.0
"""xl's disk syntax: the strings of its manual page, and what is wrong with others."""

import re
from typing import Any

import pytest

from xvd.errors import ConfigError
from xvd.toolstack.xldisk import parse_xl_disk

XVDA, HDC = 51712, 5632


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("/dev/vg/guest,raw,xvda,rw", {"target": "/dev/vg/guest", "format": "raw", "number": XVDA}),
        ("/dev/vg/guest,,hda", {"target": "/dev/vg/guest", "format": "raw", "vdev": "hda"}),
        ("format=raw, vdev=xvda, access=rw, target=/dev/vg/guest", {"target": "/dev/vg/guest"}),
        ("vdev=xvda,access=ro,target=/d", {"writable": False}),
        ("/d,raw,xvda,r", {"writable": False}),
        ("/d,raw,xvda,w", {"writable": True}),
        ("format=raw,vdev=hdc,access=ro,devtype=cdrom,target=/srv/cd.iso",
         {"cdrom": True, "number": HDC, "target": "/srv/cd.iso"}),
        ("raw:/x,raw,hdc,cdrom", {"cdrom": True}),
        (",,hdc,cdrom", {"cdrom": True, "target": ""}),
        ("vdev=xvda,target=memory:8M", {"target": "memory:8M"}),
        ("vdev=xvda,target=a,b,c=d,format=raw", {"target": "a,b,c=d,format=raw"}),
        ("vdev=xvda, target=with, blanks ", {"target": "with, blanks "}),
        ("vdev=xvda,no-discard,direct-io-safe,untrusted,target=/d",
         {"discard": False, "direct_io_safe": True, "trusted": False}),
        ("vdev=xvda,backend=storage,backendtype=qdisk,script=block,target=/d",
         {"backend": "storage", "backendtype": "qdisk", "script": "block"}),
        ("vdev=d0p1,target=/d", {"vdev": "d0p1"}),
    ],
)  # fmt: skip
def test_a_disk_is_what_its_text_says(text: str, wanted: dict[str, Any]) -> None:
    disk = parse_xl_disk(text)
    assert {name: getattr(disk, name) for name in wanted} == wanted


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "'' names no vdev; add vdev=xvda"),
        ("/d", "names no vdev; add vdev=xvda"),
        ("vdev=xvda", "names no target; add target=IMAGE at its end"),
        (
            "vdev=xvda,access=maybe,target=/d",
            "unknown value 'maybe' for access; there are r, ro, w",
        ),
        ("/d,zip,xvda", "unknown value 'zip' for format; there are raw, qcow"),
        ("/d,raw,xvda,rw,more", "too many positional parameters: 'more'"),
        ("vdev=xvda,vdev=xvdb,target=/d", "vdev respecified: 'xvdb'"),
        ("vdev=xvda,colour=red,target=/d", "unknown key 'colour' in a disk description; there are"),
        ("vdev=xvda,backendtype=floppy,target=/d", "unknown value 'floppy' for backendtype"),
        ("vdev=xvda,devtype=tape,target=/d", "unknown value 'tape' for devtype; there are disk, c"),
        ("vdev=nvme0,target=/d", "nvme0"),
        ("vdev=xvd,target=/d", "xvd"),
    ],
)
def test_what_is_wrong_is_named(text: str, error: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(error)):
        parse_xl_disk(text)
