# SPDX-License-Identifier: Apache-2.0
"""Our computed offsets against Xen's own public headers, by a C compiler that knows them."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from xvd.blkif import abi
from xvd.blkif.abi import Abi

HEADER = Path("/usr/include/xen/io/blkif.h")
XEN_STRUCTS = {
    "struct blkif_request_segment": abi.SEGMENT,
    "struct blkif_request": abi.REQUEST,
    "struct blkif_request_discard": abi.DISCARD,
    "struct blkif_request_indirect": abi.INDIRECT,
    "struct blkif_response": abi.RESPONSE,
}
CONSTANTS: dict[str, int] = {
    "BLKIF_OP_READ": abi.Op.READ,
    "BLKIF_OP_WRITE": abi.Op.WRITE,
    "BLKIF_OP_WRITE_BARRIER": abi.Op.WRITE_BARRIER,
    "BLKIF_OP_FLUSH_DISKCACHE": abi.Op.FLUSH_DISKCACHE,
    "BLKIF_OP_RESERVED_1": abi.Op.RESERVED_1,
    "BLKIF_OP_DISCARD": abi.Op.DISCARD,
    "BLKIF_OP_INDIRECT": abi.Op.INDIRECT,
    "BLKIF_RSP_OKAY": abi.Status.OKAY,
    "BLKIF_RSP_ERROR": abi.Status.ERROR,
    "BLKIF_RSP_EOPNOTSUPP": abi.Status.EOPNOTSUPP,
    "BLKIF_DISCARD_SECURE": abi.DiscardFlag.SECURE,
    "BLKIF_MAX_SEGMENTS_PER_REQUEST": abi.MAX_SEGMENTS_PER_REQUEST,
    "BLKIF_MAX_INDIRECT_PAGES_PER_REQUEST": abi.MAX_INDIRECT_PAGES_PER_REQUEST,
    "VDISK_CDROM": abi.InfoFlag.CDROM,
    "VDISK_REMOVABLE": abi.InfoFlag.REMOVABLE,
    "VDISK_READONLY": abi.InfoFlag.READONLY,
    "XenbusStateInitialising": abi.XenbusState.INITIALISING,
    "XenbusStateInitWait": abi.XenbusState.INIT_WAIT,
    "XenbusStateInitialised": abi.XenbusState.INITIALISED,
    "XenbusStateConnected": abi.XenbusState.CONNECTED,
    "XenbusStateClosing": abi.XenbusState.CLOSING,
    "XenbusStateClosed": abi.XenbusState.CLOSED,
    "XenbusStateReconfiguring": abi.XenbusState.RECONFIGURING,
    "XenbusStateReconfigured": abi.XenbusState.RECONFIGURED,
    "offsetof(struct blkif_sring, req_prod)": abi.SRING_REQ_PROD,
    "offsetof(struct blkif_sring, req_event)": abi.SRING_REQ_EVENT,
    "offsetof(struct blkif_sring, rsp_prod)": abi.SRING_RSP_PROD,
    "offsetof(struct blkif_sring, rsp_event)": abi.SRING_RSP_EVENT,
    "offsetof(struct blkif_sring, ring)": abi.RING_HEADER_SIZE,
}


def missing(what: str) -> None:
    if os.environ.get("XVD_REQUIRE_TOOLS") == "1":
        pytest.fail(f"{what}, and XVD_REQUIRE_TOOLS=1 forbids to skip")
    pytest.skip(what)


def assertions(one: Abi) -> list[str]:
    """One _Static_assert for each fact that the table claims."""
    facts = CONSTANTS | {
        "sizeof(union blkif_sring_entry)": one.entry_size,
        "__CONST_RING_SIZE(blkif, 4096)": abi.nr_ents(1, one),
        "__CONST_RING_SIZE(blkif, 65536)": abi.nr_ents(16, one),
    }
    for name, struct in XEN_STRUCTS.items():
        facts[f"sizeof({name})"] = one.size(struct)
        for field in struct.fields:
            facts[f"offsetof({name}, {field.name})"] = one.offset(struct, field.name)
    return [f'_Static_assert({fact} == {int(value)}, "{fact}");' for fact, value in facts.items()]


@pytest.mark.tools
# The ARM layout is what a compiler gives where u64 is aligned to 8, as on x86_64.
@pytest.mark.parametrize(
    ("one", "mode"), [(Abi.X86_64, "-m64"), (Abi.X86_32, "-m32"), (Abi.ARM, "-m64")]
)
def test_offsets_are_those_of_xens_headers(one: Abi, mode: str, tmp_path: Path) -> None:
    compiler = shutil.which("gcc")
    if compiler is None or not HEADER.exists():
        missing("gcc or libxen-dev is not installed")
    assert compiler is not None
    source = tmp_path / "layout.c"
    includes = ["stdint.h", "stddef.h", "xen/xen.h", "xen/io/blkif.h", "xen/io/xenbus.h"]
    lines = [f"#include <{include}>" for include in includes] + assertions(one)
    source.write_text("\n".join(lines) + "\n")

    # Freestanding: the 32-bit C library's headers need not be installed.
    command = [compiler, mode, "-ffreestanding", "-fsyntax-only", str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)

    assert result.returncode == 0, result.stderr
