# SPDX-License-Identifier: Apache-2.0
"""What is said of storage that fails: once, with the remedy."""

import errno
import logging
import os
from typing import Final

from xvd.engines.interface import Engine

REMEDIES: Final = {
    errno.ENOSPC: "free some space where the image lies",
    errno.EDQUOT: "raise the quota of the image's owner",
    errno.EFBIG: "the file system cannot hold a file this large",
}


class StorageLog:
    """The words for one disk's storage; `log` begins each line with the disk."""

    def __init__(self, log: logging.LoggerAdapter[logging.Logger]) -> None:
        self._log = log
        self._trouble = ""

    def failed(self, engine: Engine | None, number: int, failures: int) -> None:
        """Operations have failed, the last one with errno `number`.

        What is wrong for good is told once, and explains every failure after it.
        """
        trouble = self._new(engine)
        if trouble or not self._trouble:
            remedy = trouble or REMEDIES.get(number, "look at the storage")
            text = "storage fails: %s (%d failures so far); the guest sees I/O errors: %s"
            self._log.error(text, os.strerror(number), failures, remedy, event="storage-error")

    def examined(self, engine: Engine | None) -> None:
        """Note what was found when the storage was last examined."""
        if trouble := self._new(engine):
            self._log.error("%s", trouble, event="storage-in-trouble")

    def smaller(self, found: int, promised: int) -> None:
        """Storage of `found` bytes is opened anew for a disk of `promised`."""
        self._log.error(
            "the storage has %d bytes, the disk that its guest uses %d: what is missing is an I/O "
            "error; bring the image back, or let the disk be that small: xvd resize --shrink",
            found, promised, event="storage-smaller",
        )  # fmt: skip

    def _new(self, engine: Engine | None) -> str:
        trouble = "" if engine is None else engine.trouble
        told, self._trouble = self._trouble, trouble
        return "" if trouble == told else trouble
