# SPDX-License-Identifier: Apache-2.0
"""The exclusive lock of an image, and who has it.

A process that is killed leaves the lock behind, and the cluster takes it from it after half a
minute. So whoever takes the lock notes in the image which process it is; another one on the same
host that finds that process dead takes the lock at once. The cluster lets nothing through any more
that the dead one has sent.
"""

import ctypes
import errno
import os
import time
from pathlib import Path
from typing import Final

import msgspec

from xvd.engines.rbd.library import Image
from xvd.errors import EngineError
from xvd.files import boot_id

_EXCLUSIVE: Final = 0
"""RBD_LOCK_MODE_EXCLUSIVE of rbd/librbd.h."""
_KEY: Final = b"xvd.holder"
_TEXT_MAX: Final = 1024
_LOCKED_S: Final = 0.2
_STARTED: Final = 19
"""Of the fields of /proc/PID/stat behind the command's name, that of the start: proc(5)."""


class Holder(msgspec.Struct, frozen=True):
    """A process that has the lock. owner: as the cluster calls it. boot: of its host. namespace: in
    which its number is meant."""

    owner: str
    boot: str
    namespace: int
    pid: int
    started: str

    @classmethod
    def this(cls, owner: str) -> "Holder":
        """This process."""
        return cls(owner, boot_id(), _namespace(), os.getpid(), _start_of(os.getpid()))

    @property
    def is_dead(self) -> bool:
        """Whether it is known to be dead: it was of this host, and there is no such process."""
        here = (self.boot, self.namespace) == (boot_id(), _namespace())
        return here and _start_of(self.pid) != self.started


def _namespace() -> int:
    return os.stat("/proc/self/ns/pid").st_ino


def _start_of(pid: int) -> str:
    """When a process began, in ticks; empty if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return text.rpartition(")")[2].split()[_STARTED]


def take_lock(image: Image, name: str, patience_s: float) -> None:
    """Take the lock. Raises `EngineError`: EBUSY where somebody else has it for longer than
    `patience_s`, and EINVAL where the image has none."""
    deadline = time.monotonic() + patience_s
    while True:
        _break_if_dead(image)
        try:
            image.call("lock_acquire", _EXCLUSIVE)
            break
        except EngineError as error:
            if error.errno == errno.EINVAL:
                text = f"{name} has no lock: rbd feature enable IMAGE exclusive-lock"
                raise EngineError(errno.EINVAL, text) from None
            if error.errno not in (errno.EBUSY, errno.EROFS):
                raise
            if time.monotonic() >= deadline:
                raise EngineError(errno.EBUSY, f"{name} is in use") from None
        time.sleep(_LOCKED_S)
    holder = msgspec.json.encode(Holder.this(_owner(image)))
    image.call("metadata_set", _KEY, holder)


def _owner(image: Image) -> str:
    """Ask who has the lock, as the cluster calls it; empty if nobody has."""
    mode, count = ctypes.c_int(), ctypes.c_size_t(1)
    found = (ctypes.c_char_p * 1)()
    try:
        image.call("lock_get_owners", ctypes.byref(mode), found, ctypes.byref(count))
    except EngineError as error:
        if error.errno == errno.ENOENT:
            return ""
        raise
    owner = (found[0] or b"").decode()
    image.forget("lock_get_owners_cleanup", found, count)
    return owner


def _noted(image: Image) -> Holder | None:
    buffer, size = ctypes.create_string_buffer(_TEXT_MAX), ctypes.c_size_t(_TEXT_MAX)
    try:
        image.call("metadata_get", _KEY, buffer, ctypes.byref(size))
        return msgspec.json.decode(buffer.value, type=Holder)
    except (EngineError, msgspec.MsgspecError):
        return None  # nobody of ours


def _break_if_dead(image: Image) -> None:
    owner, holder = _owner(image), _noted(image)
    if owner and holder is not None and holder.owner == owner and holder.is_dead:
        image.call("lock_break", _EXCLUSIVE, owner.encode())
