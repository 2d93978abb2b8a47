# SPDX-License-Identifier: Apache-2.0
"""What an administrator decides about a daemon's disks."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Settings:
    """What the administrator decides for every disk of a daemon.

    copying: grant copy instead of mapping. state_dir: where the journals of live rings are kept
    for a successor; None keeps none, and then only an idle ring can be taken over.
    max_indirect_segments: 0 (no indirect requests), or 12 to 4096; xen-blkback has 256.
    """

    copying: bool = False
    state_dir: Path | None = None
    max_indirect_segments: int = 256
