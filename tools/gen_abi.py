# SPDX-License-Identifier: Apache-2.0
"""Print the data plane's C header and Cython's view of it from the tables in `xvd`, or check them.

Usage: ``gen_abi.py`` prints both, ``gen_abi.py --write`` replaces the committed files, and
``gen_abi.py --check`` exits with 1 when one of them is not what would be printed.
"""

import sys
from collections.abc import Iterable, Iterator
from enum import IntEnum
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEADER = ROOT / "src/xvd/dataplane/abi_gen.h"
DECLARATIONS = ROOT / "src/xvd/dataplane/abi.pxd"
sys.path.insert(0, str(ROOT / "src"))

from xvd import types  # noqa: E402
from xvd.blkif import abi, operations, validate  # noqa: E402
from xvd.dataplane.types import StepFlag, Wish  # noqa: E402

LAYOUT = {  # the prefix of a table entry, its struct, and the fields the data plane reads
    "rw": (abi.REQUEST, "operation nr_segments handle id sector_number seg"),
    "discard": (abi.DISCARD, "flag handle id sector_number nr_sectors"),
    "indirect": (abi.INDIRECT, "indirect_op nr_segments id sector_number handle indirect_grefs"),
    "other": (abi.OTHER, "id"),
    "response": (abi.RESPONSE, "id operation status size"),
    "segment": (abi.SEGMENT, "size gref first_sect last_sect"),
}
CONSTANTS = {
    "XEN_PAGE_SIZE": types.PAGE_SIZE,
    "BLKIF_SECTOR_SIZE": types.RING_SECTOR_SIZE,
    "BLKIF_SECTORS_PER_PAGE": abi.SECTORS_PER_PAGE,
    "BLKIF_MAX_SEGMENTS_PER_REQUEST": abi.MAX_SEGMENTS_PER_REQUEST,
    "BLKIF_SEGMENTS_PER_INDIRECT_PAGE": abi.SEGMENTS_PER_INDIRECT_PAGE,
    "BLKIF_MAX_INDIRECT_PAGES_PER_REQUEST": abi.MAX_INDIRECT_PAGES_PER_REQUEST,
    "BLKIF_MAX_INDIRECT_SEGMENTS": abi.MAX_INDIRECT_SEGMENTS,
    "BLKIF_MAX_ENTRY_SIZE": max(one.entry_size for one in abi.Abi),
    "BLKIF_RING_HEADER": abi.RING_HEADER_SIZE,
    "BLKIF_OFFER_SECURE": operations.OFFER_SECURE,
    "BLKIF_NR_KINDS": len(operations.Kind),
    "BLKIF_ASKED_MAX": max(len(row.asked) for row in operations.OPERATIONS),
    "SRING_REQ_PROD": abi.SRING_REQ_PROD,
    "SRING_REQ_EVENT": abi.SRING_REQ_EVENT,
    "SRING_RSP_PROD": abi.SRING_RSP_PROD,
    "SRING_RSP_EVENT": abi.SRING_RSP_EVENT,
    "SRING_INSTANCE": abi.SRING_INSTANCE,
}


def prefixed(prefix: str, members: Iterable[IntEnum]) -> list[tuple[str, int]]:
    return [(f"{prefix}_{member.name}", member.value) for member in members]


def counted(prefix: str, members: type[IntEnum]) -> list[tuple[str, int]]:
    return [*prefixed(prefix, members), (f"{prefix}_COUNT", len(members))]


FLAGS = {"BLKIF_FLAG_DIVISIBLE": 1, "BLKIF_FLAG_OPTIONAL": 2}
ENUMS: dict[str, list[tuple[str, int]]] = {
    "blkif_op": prefixed("BLKIF_OP", abi.Op),
    "blkif_rsp": prefixed("BLKIF_RSP", abi.Status),
    "blkif_discard": prefixed("BLKIF_DISCARD", abi.DiscardFlag),
    "blkif_constant": list(CONSTANTS.items()),
    "blkif_abi": [
        *((f"BLKIF_ABI_{one.name}", one.number) for one in abi.Abi),
        ("BLKIF_NR_ABI", len(abi.Abi)),
    ],
    "blkif_shape": prefixed("BLKIF_SHAPE", operations.Shape),
    "blkif_data": prefixed("BLKIF_DATA", operations.Data),
    "blkif_kind": prefixed("BLKIF_KIND", operations.Kind),
    "blkif_refusal": counted("REFUSAL", validate.Refusal),
    "blkif_breach": counted("BREACH", validate.Breach),
    "blkif_flag": list(FLAGS.items()),
    "xen_grant_status": prefixed("GNTST", types.GrantStatus),
    "xvd_engine_op": prefixed("ENGINE", types.EngineOp),
    "xvd_step_flag": prefixed("STEP", StepFlag),
    "xvd_client_wish": prefixed("CLIENT", Wish),
}
OPERATION = {
    "shape": "BLKIF_SHAPE_*; 0 in the rows of numbers that nobody knows",
    "kind": "BLKIF_KIND_*",
    "data": "BLKIF_DATA_*",
    "flags": "BLKIF_FLAG_*",
    "nr_asked": "of one with data; of one without it is one",
    "asked[BLKIF_ASKED_MAX]": "ENGINE_*, in this order",
}
"""The fields of a row of `blkif_operations`, all of a byte, and what is in them."""


# ---- The C header ----------------------------------------------------------------------------


def enum(tag: str, members: Iterable[tuple[str, int]]) -> Iterator[str]:
    yield f"enum {tag} {{"
    yield from (f"  {name} = {value}," for name, value in members)
    yield "};\n"


def layout_entries() -> Iterator[tuple[str, abi.Struct, str]]:
    for prefix, (struct, fields) in LAYOUT.items():
        for field in fields.split():
            # Two fields bring the prefix in their own name: indirect_op and indirect_grefs.
            yield f"{prefix}_{field.removeprefix(prefix + '_')}", struct, field


def layouts() -> Iterator[str]:
    entries = list(layout_entries())
    yield "/* Where each field of a ring slot lies, in bytes; one table per ABI. */"
    yield "struct blkif_layout {\n  uint16_t entry_size; /* from one slot to the next */"
    yield from (f"  uint16_t {name};" for name, _, _ in entries)
    yield "};\n"
    yield "static const struct blkif_layout blkif_layouts[BLKIF_NR_ABI] = {"
    for one in abi.Abi:
        yield f"  [BLKIF_ABI_{one.name}] = {{\n    .entry_size = {one.entry_size},"
        for name, struct, field in entries:
            size = field == "size"
            yield f"    .{name} = {one.size(struct) if size else one.offset(struct, field)},"
        yield "  },"
    yield "};\n"


def operation_rows() -> Iterator[str]:
    yield "/* What is to be known of an operation: src/xvd/blkif/operations.py. */"
    yield "struct blkif_operation {"
    yield from (f"  uint8_t {name}; /* {text} */" for name, text in OPERATION.items())
    yield "};\n"
    yield "/* By the byte that a slot begins with, whatever it is. */"
    yield "static const struct blkif_operation blkif_operations[256] = {"
    for row in operations.OPERATIONS:
        held = {"BLKIF_FLAG_DIVISIBLE": row.divisible, "BLKIF_FLAG_OPTIONAL": bool(row.feature)}
        flags = " | ".join(name for name, has in held.items() if has) or "0"
        asked = ", ".join(f"ENGINE_{one.name}" for one in row.asked) or "0"
        yield f"  [BLKIF_OP_{row.op.name}] = {{"
        yield f"    BLKIF_SHAPE_{row.shape.name}, BLKIF_KIND_{row.kind.name},"
        yield f"    BLKIF_DATA_{row.data.name}, {flags},"
        yield f"    {len(row.asked)}, {{{asked}}},"
        yield "  },"
    yield "};\n"


def names_table(table: str, size: str, members: list[tuple[str, str]]) -> Iterator[str]:
    yield f"static const char *const {table}[{size}] = {{"
    yield from (f'  [{name}] = "{text}",' for name, text in members)
    yield "};\n"


def named(prefix: str, members: type[IntEnum]) -> list[tuple[str, str]]:
    return [(f"{prefix}_{one.name}", one.name.lower()) for one in members]


def header() -> str:
    lines = ["/* SPDX-License-Identifier: Apache-2.0 */"]
    lines += ["/* Generated by tools/gen_abi.py from src/xvd/blkif; do not edit. */"]
    lines += ["#ifndef XVD_ABI_GEN_H\n#define XVD_ABI_GEN_H\n\n#include <stdint.h>\n"]
    for tag, members in ENUMS.items():
        lines += enum(tag, members)
    lines += [*layouts(), *operation_rows()]
    lines += names_table("blkif_refusal_names", "REFUSAL_COUNT", named("REFUSAL", validate.Refusal))
    lines += ["static const int16_t blkif_refusal_status[REFUSAL_COUNT] = {"]
    for refusal, status in validate.REFUSAL_STATUS.items():
        lines += [f"  [REFUSAL_{refusal.name}] = BLKIF_RSP_{status.name},"]
    lines += ["};\n"]
    lines += names_table("blkif_breach_names", "BREACH_COUNT", named("BREACH", validate.Breach))
    return "\n".join([*lines, "#endif"]) + "\n"


# ---- Cython's view of it ---------------------------------------------------------------------


def declarations() -> str:
    lines = [
        "# SPDX-License-Identifier: Apache-2.0",
        '"""Generated by tools/gen_abi.py: Cython\'s view of abi_gen.h. Do not edit."""',
        "",
        "from libc.stdint cimport int16_t, uint8_t, uint16_t",
        "",
        "",
        'cdef extern from "abi_gen.h" nogil:',
    ]
    for members in ENUMS.values():
        lines += ["    enum:", *(f"        {name}" for name, _ in members), ""]
    lines += ["    struct blkif_layout:", "        uint16_t entry_size"]
    lines += [f"        uint16_t {name}" for name, _, _ in layout_entries()]
    lines += ["", "    struct blkif_operation:"]
    lines += [f"        uint8_t {name}" for name in OPERATION]
    lines += [
        "",
        "    const blkif_layout blkif_layouts[]",
        "    const blkif_operation blkif_operations[]",
        "    const int16_t blkif_refusal_status[]",
        "    const char *const blkif_refusal_names[]",
        "    const char *const blkif_breach_names[]",
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    made = {HEADER: header(), DECLARATIONS: declarations()}
    if arguments == ["--write"]:
        for path, text in made.items():
            path.write_text(text)
    elif arguments == ["--check"]:
        stale = [path.name for path, text in made.items() if path.read_text() != text]
        if stale:
            print(f"{', '.join(stale)}: stale; run tools/gen_abi.py --write", file=sys.stderr)
            return 1
    else:
        sys.stdout.write("\n".join(made.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
