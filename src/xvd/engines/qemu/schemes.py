# SPDX-License-Identifier: Apache-2.0
"""The schemes of storage that a storage daemon opens. Whoever uses none does not load the rest."""

import importlib
from collections.abc import Callable
from typing import Final

from xvd.engines.interface import Engine, Opening, Scheme
from xvd.engines.qemu.nodes import SOURCES, Nodes


def _opener(make: Callable[[str, Opening], Nodes]) -> Callable[[str, Opening], Engine]:
    def open_nodes(rest: str, how: Opening) -> Engine:
        nodes = make(rest, how)
        module = importlib.import_module("xvd.engines.qemu.engine")
        engine: Engine = module.QemuEngine(nodes, how.patience_s)
        return engine

    return open_nodes


SCHEMES: Final = tuple(
    Scheme(name, form, description, _opener(make)) for name, form, description, make in SOURCES
)
