# SPDX-License-Identifier: Apache-2.0
"""librados and librbd, found when somebody needs them: connections to clusters, and open images.

What a library says by a negative number becomes `EngineError`. Nothing here is called while the GIL
is held for long: ctypes lets it go around each call.
"""

import ctypes
import errno
import os
import threading
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from xvd.engines.rbdio import CALLS, ZEROES_CALL
from xvd.errors import EngineError

_TEXT_MAX: Final = 256
_SNAPSHOTS_MAX: Final = 1024


@cache
def _load(name: str, package: str) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(name)
    except OSError:
        text = f"{name} is not here, which such storage needs; on Debian: apt-get install {package}"
        raise EngineError(errno.ENOENT, text) from None


def rados() -> ctypes.CDLL:
    """librados."""
    return _load("librados.so.2", "librados2")


def librbd() -> ctypes.CDLL:
    """librbd."""
    return _load("librbd.so.1", "librbd1")


def addresses() -> list[int]:
    """The addresses of what a channel calls: those of `CALLS`, and of `ZEROES_CALL` or 0."""
    library = librbd()
    found = [getattr(library, name) for name in CALLS]
    found.append(getattr(library, ZEROES_CALL, None))
    return [ctypes.cast(call, ctypes.c_void_p).value or 0 for call in found]


def check(result: int, what: str) -> int:
    """Return what a call returned; `EngineError` if that says no. what: it was about this."""
    if result < 0:
        raise EngineError(-result, f"{what}: {os.strerror(-result)}")
    return result


@dataclass(frozen=True, slots=True)
class Where:
    """Which image: of a cluster, that a file describes, as one of its users."""

    pool: str
    namespace: str
    image: str
    snapshot: str = ""
    user: str = ""
    conf: str = ""

    def __str__(self) -> str:
        name = "/".join(filter(None, (self.pool, self.namespace, self.image)))
        return f"rbd:{name}@{self.snapshot}" if self.snapshot else f"rbd:{name}"


class Cluster:
    """A connection to a cluster, shared by all disks that are of it."""

    _known: Final[dict[tuple[str, str], "Cluster"]] = {}
    _mutex: Final = threading.Lock()

    def __init__(self, user: str, conf: str) -> None:
        self.handle = ctypes.c_void_p()
        self._key = (user, conf)
        self._users = 0
        library = rados()
        name = user.encode() if user else None
        check(library.rados_create(ctypes.byref(self.handle), name), "librados")
        try:
            check(library.rados_conf_read_file(self.handle, conf.encode() if conf else None),
                  f"the cluster's description {conf or '/etc/ceph/ceph.conf'}")  # fmt: skip
            # For the first word from it only: whoever uses a disk waits for it without end.
            library.rados_conf_set(self.handle, b"client_mount_timeout", b"30")
            check(library.rados_connect(self.handle), "the cluster")
        except BaseException:
            library.rados_shutdown(self.handle)
            raise

    @classmethod
    def get(cls, user: str, conf: str) -> "Cluster":
        """The connection there is, or a new one; `leave` is due."""
        with cls._mutex:
            found = cls._known.get((user, conf))
            if found is None:
                found = cls._known[user, conf] = cls(user, conf)
            found._users += 1
            return found

    def leave(self) -> None:
        """It is used by one less."""
        with self._mutex:
            self._users -= 1
            if self._users == 0:
                del self._known[self._key]
                rados().rados_shutdown(self.handle)

    @property
    def fsid(self) -> str:
        """The cluster's own name."""
        buffer = ctypes.create_string_buffer(_TEXT_MAX)
        check(rados().rados_cluster_fsid(self.handle, buffer, _TEXT_MAX), "the cluster's name")
        return buffer.value.decode()


class _Info(ctypes.Structure):
    """rbd_image_info_t of rbd/librbd.h."""

    _fields_ = (
        ("size", ctypes.c_uint64),
        ("obj_size", ctypes.c_uint64),
        ("num_objs", ctypes.c_uint64),
        ("order", ctypes.c_int),
        ("block_name_prefix", ctypes.c_char * 24),
        ("parent_pool", ctypes.c_int64),
        ("parent_name", ctypes.c_char * 96),
    )


class _Snapshot(ctypes.Structure):
    """rbd_snap_info_t."""

    _fields_ = (("id", ctypes.c_uint64), ("size", ctypes.c_uint64), ("name", ctypes.c_char_p))


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


class Image:
    """An open image. Any thread."""

    def __init__(self, where: Where, *, read_only: bool) -> None:
        self.handle = ctypes.c_void_p()
        self._where = where
        self._library = librbd()
        self._cluster = Cluster.get(where.user, where.conf)
        self._pool = ctypes.c_void_p()
        try:
            self._open_pool()
            opening = self._library.rbd_open_read_only if read_only else self._library.rbd_open
            snapshot = where.snapshot.encode() if where.snapshot else None
            image = where.image.encode()
            result = opening(self._pool, image, ctypes.byref(self.handle), snapshot)
            check(result, str(where))
        except BaseException:
            self._close_pool()
            raise

    def _open_pool(self) -> None:
        library, where = rados(), self._where
        pool, made = where.pool.encode(), ctypes.byref(self._pool)
        check(library.rados_ioctx_create(self._cluster.handle, pool, made), f"pool {where.pool}")
        if where.namespace:
            library.rados_ioctx_set_namespace(self._pool, where.namespace.encode())

    def _close_pool(self) -> None:
        if self._pool:
            rados().rados_ioctx_destroy(self._pool)
        self._cluster.leave()

    def call(self, name: str, *arguments: Any) -> int:
        """Call librbd's `rbd_<name>` with the image and these; what it returns. `EngineError`."""
        call = getattr(self._library, f"rbd_{name}", None)
        if call is None:
            raise EngineError(errno.EOPNOTSUPP, f"this librbd has no {name}")
        call.restype = ctypes.c_ssize_t if name in ("read", "write") else ctypes.c_int
        return check(call(self.handle, *arguments), str(self._where))

    def forget(self, name: str, *arguments: Any) -> None:
        """Call librbd's `rbd_<name>`, which gives something back and has no image."""
        getattr(self._library, f"rbd_{name}")(*arguments)

    @property
    def identity(self) -> str:
        """One line that tells it from any other image of any cluster."""
        buffer = ctypes.create_string_buffer(_TEXT_MAX)
        self.call("get_id", buffer, ctypes.c_size_t(_TEXT_MAX))
        at = f"@{self._where.snapshot}" if self._where.snapshot else ""
        pool = "/".join(filter(None, (self._where.pool, self._where.namespace)))
        return f"rbd image {buffer.value.decode()}{at} in {pool} of {self._cluster.fsid}"

    @property
    def size(self) -> int:
        """Bytes, now."""
        size = ctypes.c_uint64()
        self.call("get_size", ctypes.byref(size))
        return size.value

    @property
    def object_size(self) -> int:
        """Bytes of one of its objects."""
        info = _Info()
        self.call("stat", ctypes.byref(info), ctypes.c_size_t(ctypes.sizeof(info)))
        return info.obj_size  # type: ignore[no-any-return]

    def snapshots(self) -> list[tuple[str, int]]:
        """Each snapshot's name, and when it was made, in seconds since 1970."""
        found, room = (_Snapshot * _SNAPSHOTS_MAX)(), ctypes.c_int(_SNAPSHOTS_MAX)
        count = self.call("snap_list", found, ctypes.byref(room))
        try:
            return [(one.name.decode(), self._made(one.id)) for one in found[:count]]
        finally:
            self._library.rbd_snap_list_end(found)

    def _made(self, number: int) -> int:
        when = _Timespec()
        self.call("snap_get_timestamp", ctypes.c_uint64(number), ctypes.byref(when))
        return when.tv_sec  # type: ignore[no-any-return]

    def close(self) -> None:
        """Close it; nothing may be in flight."""
        self._library.rbd_close(self.handle)
        self._close_pool()
