# SPDX-License-Identifier: Apache-2.0
"""Standard output: what a verb prints reaches somebody, or the verb fails and says so."""

import errno
import os
import sys
from typing import IO

from xvd.errors import XvdError, describe


class OutputLost(XvdError):
    """Standard output takes no more: it is closed, full, or nobody reads it."""

    def __init__(self, error: OSError) -> None:
        super().__init__(f"standard output: {describe(error)}")
        self.unread = error.errno == errno.EPIPE


def claim_descriptors() -> None:
    """Hold 0, 1 and 2 where they are closed: or a socket of ours would be taken for the output.

    What is printed then fails; what is logged is lost.
    """
    for fd, flags in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, flags)  # the lowest number that is free, which is this one
    sys.stdout = _there(sys.stdout, 1)
    sys.stderr = _there(sys.stderr, 2)


def _there(stream: IO[str] | None, fd: int) -> IO[str]:
    return open(fd, "w", encoding="utf-8", closefd=False) if stream is None else stream


def tell(text: str) -> None:
    """Print at once; raises `OutputLost`."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        raise OutputLost(error) from None


def print_json(value: object, indent: int = 2) -> None:
    """Print one JSON document; with an indent of 0 on one line."""
    import msgspec

    data = msgspec.json.encode(value)
    tell((msgspec.json.format(data, indent=indent) if indent else data).decode() + "\n")


def drop() -> None:
    """Drop whatever is printed from now on: not even the interpreter's last flush fails."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
