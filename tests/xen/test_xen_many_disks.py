# SPDX-License-Identifier: Apache-2.0
"""Many disks at once, beside one that is busy all the time: each is taken before libxl gives up."""

from string import ascii_lowercase

import pytest
from xen_host import COMPLAINTS, Slot, domu, sh, typed, whatever_is_lost

pytestmark = [pytest.mark.usefixtures("guests"), pytest.mark.timeout(900)]

NULL = "null:64M"
READING = (
    "((fio --name=r --filename=/dev/xvda --direct=1 --ioengine=libaio --iodepth=32 --rw=randread"
    " --bs=4k --size=64m --time_based --runtime=3000 > /dev/null 2>&1; echo $? > /tmp/ended) &)"
)
STILL_READS = "[ ! -e /tmp/ended ] && pidof fio"
EACH_IS_READ = (
    "for disk in {disks}; do dd if=/dev/$disk of=/dev/null bs=64k count=16 iflag=direct 2>&1"
    " || exit; done"
)


@pytest.fixture
def busy(guests: None, best_slot: Slot) -> str:
    """A guest that reads its first disk all the time."""
    sh(f"domu -n u1 -m 300 -b -d '{best_slot.line(NULL)}'")
    typed("u1", READING)
    return "u1"


def test_a_guest_with_eight_disks_comes_up_beside_a_busy_one(busy: str, best_slot: Slot) -> None:
    names = [f"xvd{letter}" for letter in ascii_lowercase[:8]]
    words = [word for name in names for word in ("-d", best_slot.line(NULL, name))]
    script = f"{EACH_IS_READ.format(disks=' '.join(names))}; ! {COMPLAINTS}"

    whatever_is_lost(lambda: domu("-n", "u2", *words, script))

    typed(busy, STILL_READS)


def test_twenty_disks_come_and_go_beside_a_busy_one(busy: str, best_slot: Slot) -> None:
    names = [f"xvd{letter}" for letter in ascii_lowercase[1:21]]
    for name in names:
        sh(f"xl block-attach {busy} '{best_slot.line(NULL, name)}'")
    script = f"({EACH_IS_READ.format(disks=' '.join(names))}) && ! {COMPLAINTS}"

    typed(busy, script)

    for name in names:
        sh(f"xl block-detach {busy} {name}")
    typed(busy, STILL_READS)
