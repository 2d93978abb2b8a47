# SPDX-License-Identifier: Apache-2.0
"""How much of each thing a domain of the emulated machine may have."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """What one domain may have. The defaults are Xen's, but for the map-track (Xen: 262144)."""

    pages: int = 65536
    grefs: int = 32768
    tracks: int = 65536
    ports: int = 4096
