# SPDX-License-Identifier: Apache-2.0
"""Which nodes of the two directories a backend reads: those that it knows, and of a frontend's no
more than what was offered can make it write."""

import re
from collections.abc import Callable

from xvd.blkif.nodes import NODES, BackendFeatures, Side

_NUMBERED = re.compile(r"(ring-ref|queue-)([0-9]{1,4})", re.ASCII)


def own_node(name: str) -> bool:
    """Whether a child of the backend's own directory is read."""
    return (Side.BACKEND, name) in NODES


def frontends_node(offer: BackendFeatures) -> Callable[[str], bool]:
    """Whether a child of a frontend's directory, or of one of its queues', is read.

    A guest may fill its directory with as many nodes as its quota allows: a look at it has to cost
    no more for that.
    """
    limits = {"ring-ref": 1 << offer.max_ring_page_order, "queue-": offer.max_queues}

    def wanted(name: str) -> bool:
        numbered = _NUMBERED.fullmatch(name)
        if numbered is None:
            return (Side.FRONTEND, name) in NODES
        return int(numbered[2]) < limits[numbered[1]]

    return wanted
