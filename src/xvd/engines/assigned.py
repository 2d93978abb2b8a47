# SPDX-License-Identifier: Apache-2.0
"""The storage of a disk that a toolstack has assigned to a backend."""

from collections.abc import Sequence
from typing import Final

from xvd.blkif.assignment import BackendAssignment
from xvd.engines.interface import Engine
from xvd.engines.text import in_format
from xvd.engines.uri import open_engine

LOCK_PATIENCE_S: Final = 5.0
"""How long a backend waits for the lock of a predecessor that was killed with I/O in flight."""


def storage_uri(assignment: BackendAssignment) -> str:
    """The engine URI of a disk that the toolstack assigned.

    In the tap slot libxl puts ``aio:`` before the target, whatever it is; a path is one of a file.
    """
    if assignment.image_format != "raw":
        return f"{assignment.image_format}:{assignment.image}"
    if assignment.format_said:
        return in_format(assignment.image, "raw")
    return assignment.image


def open_assigned(
    assignment: BackendAssignment, *, layers: Sequence[str] = (), device_model: bool = False
) -> Engine:
    """Open an assigned disk's storage; it may take as long as the storage does, and the lock.

    layers, device_model: as in `open_engine`.
    """
    name = assignment.name or assignment.frontend.rpartition("/")[2]
    return open_engine(
        storage_uri(assignment),
        read_only=not assignment.writable,
        layers=layers,
        patience_s=LOCK_PATIENCE_S,
        user=f"{assignment.frontend_domid}/{name}",
        device_model=device_model,
    )
