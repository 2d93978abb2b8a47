# SPDX-License-Identifier: Apache-2.0
"""docs/toolstacks.md: its XML for libvirt and its line for xl are one disk, run on real Xen."""

import re
from pathlib import Path
from xml.etree import ElementTree

from xvd.toolstack.xldisk import XlDisk, parse_xl_disk

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "toolstacks.md").read_text()
[LINE] = re.findall(r"^    disk = \['(.*)'\]$", PAGE, re.MULTILINE)
[XML] = re.findall(r"^```xml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def as_libvirt_hands_it_on(text: str) -> XlDisk:
    """A disk of libvirt's, by what `libxlMakeDisk` in libvirt's src/libxl/libxl_conf.c does."""
    disk = ElementTree.fromstring(text)

    def said(element: str, attribute: str) -> str:
        found = disk.find(element)
        return "" if found is None else found.get(attribute, "")

    return XlDisk(
        target=said("source", "dev"), format=said("driver", "type"), vdev=said("target", "dev"),
        writable=disk.find("readonly") is None, backend=said("backenddomain", "name"),
        backendtype=said("driver", "name"),
    )  # fmt: skip


def test_the_xml_and_the_line_are_the_same_disk() -> None:
    line, xml = parse_xl_disk(LINE), as_libvirt_hands_it_on(XML)

    for name in ("target", "format", "vdev", "writable", "backend", "backendtype", "script"):
        assert getattr(xml, name) == getattr(line, name), name


def test_the_page_makes_the_links_that_the_package_has() -> None:
    links = (ROOT / "debian" / "xvd.links").read_text().splitlines()
    [loop] = re.findall(r"for call in (\S+) Datapath\.\{(.*)\}; do", PAGE)

    made = {loop[0], *(f"Datapath.{name}" for name in loop[1].split(","))}

    assert made == {Path(line.split()[1]).name for line in links}


def test_the_line_is_what_the_test_on_real_xen_attaches() -> None:
    test = (ROOT / "tests" / "xen" / "test_xen_driver_domain.py").read_text()

    attached = re.findall(r'line = f"(.*)"', test)

    wanted = LINE.replace("storage", "{storage}").replace("/images/a.img", "/tmp/x.img")
    assert wanted in attached
