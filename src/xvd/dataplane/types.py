# SPDX-License-Identifier: Apache-2.0
"""What the compiled modules ask of the objects that carry C tables, for the type checker."""

from typing import Protocol


class HasPorts(Protocol):
    """An object whose capsule (see ports.pxd) leads to a C function table."""

    @property
    def ports(self) -> object:
        """The capsule."""
