# SPDX-License-Identifier: Apache-2.0
"""Every exception that xvd raises on purpose; each docstring is the rule that was broken.

A bad *request* is none of these: it is a refusal, a counter and a status on the ring. A bad
*ring* or a peer that breaks the handshake is a `PeerProtocolError`, and costs that device only.
"""

import errno as _errno
import os


def describe(error: BaseException) -> str:
    """Return what went wrong in words: of an OSError its file and its text, without a number."""
    if isinstance(error, OSError) and error.strerror:
        named = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        return f"{named}{error.strerror}"
    return str(error) or type(error).__name__


class XvdError(Exception):
    """The base of everything below; never raised itself."""


class ProtocolError(XvdError):
    """The base of the two that name who broke blkif; never raised itself."""


class LocalProtocolError(ProtocolError):
    """We asked for something that blkif forbids: a bug on this side."""


class PeerProtocolError(ProtocolError):
    """The other domain broke blkif: its device is closed, nobody else is touched."""


class PeerClosed(XvdError):
    """The other domain has gone away, or is going: what was asked cannot be finished now."""


class DiskInUse(XvdError):
    """Another frontend of this domain uses the disk: there is one at a time."""


class GrantError(XvdError):
    """A grant could not be made, mapped, copied or revoked; `status` is Xen's GNTST value."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


class EventChannelError(XvdError):
    """An event channel operation was refused; `errno` is what Linux's evtchn device would say."""

    def __init__(self, text: str, errno: int) -> None:
        super().__init__(text)
        self.errno = errno


class XenstoreError(XvdError):
    """The store refused; `code` is the error's name as xenstored spells it (``ENOENT``...)."""

    def __init__(self, code: str, text: str = "") -> None:
        super().__init__(f"{code}: {text}" if text else code)
        self.code = code

    @property
    def errno(self) -> int:
        """The code as a number; EIO for a name that this system does not know."""
        return int(getattr(_errno, self.code, _errno.EIO))


class EngineError(XvdError, OSError):
    """Storage could not be opened or used: an OSError whose text names the image and the remedy."""

    def __init__(self, errno: int, text: str = "", filename: str | None = None) -> None:
        OSError.__init__(self, errno, text or os.strerror(errno), filename)

    def __str__(self) -> str:
        return describe(self)


class BudgetError(XvdError):
    """This host has no room for what was asked; `resource` is what it is short of."""

    def __init__(self, text: str, resource: str) -> None:
        super().__init__(text)
        self.resource = resource


class ConfigError(XvdError):
    """The user asked for something impossible: a usage error whose text names the remedy."""
