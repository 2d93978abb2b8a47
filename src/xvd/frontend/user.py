# SPDX-License-Identifier: Apache-2.0
"""What a frontend's device tells whoever uses it."""

from typing import Protocol

from xvd.blkif.features import BackendFeatures
from xvd.errors import XvdError
from xvd.frontend.connection import Connection


class User(Protocol):
    """Who uses the device; called in the event loop's thread."""

    def connected(self, connection: Connection, features: BackendFeatures) -> None:
        """The queue may be used."""

    def resized(self, features: BackendFeatures) -> None:
        """The capacity has changed."""

    def disconnected(self) -> None:
        """The queue is gone; what was outstanding has to be submitted again to the next one."""

    def ended(self, error: OSError | XvdError) -> None:
        """Note that there will be no next connection. May be said twice."""
