# SPDX-License-Identifier: Apache-2.0
"""A channel used by hand, through the table of C functions that a queue's thread has of it."""

import ctypes
import os
import select
import time
from typing import Any, Final

from xvd.engines.interface import Channel
from xvd.types import EngineOp

BLOCK: Final = 4096
_PATIENCE_S: Final = 30.0


class _Io(ctypes.Structure):
    """ports.pxd: struct engine_io."""

    _fields_ = (
        ("done", ctypes.c_void_p), ("done_ctx", ctypes.c_void_p), ("op", ctypes.c_uint8),
        ("flags", ctypes.c_uint8), ("iovcnt", ctypes.c_uint16), ("result", ctypes.c_int32),
        ("offset", ctypes.c_uint64), ("length", ctypes.c_uint64), ("iov", ctypes.c_void_p),
        ("owner", ctypes.c_void_p), ("next", ctypes.c_void_p),
    )  # fmt: skip


_CTX = ctypes.c_void_p
_LOOK = ctypes.CFUNCTYPE(ctypes.c_int, _CTX)


class _Ports(ctypes.Structure):
    """ports.pxd: struct engine_ports."""

    _fields_ = (
        ("ctx", _CTX),
        ("fd", ctypes.c_int),
        ("submit", ctypes.CFUNCTYPE(None, _CTX, ctypes.c_void_p, ctypes.c_uint32)),
        ("reap", ctypes.CFUNCTYPE(ctypes.c_uint32, _CTX, ctypes.c_void_p, ctypes.c_uint32)),
        ("attach", ctypes.CFUNCTYPE(None, _CTX, ctypes.c_void_p)),
        ("peek", _LOOK),
        ("may_sleep", _LOOK),
    )


class ByPorts:
    """What a queue's thread does with its storage, one piece at a time: one read at most."""

    def __init__(self, channel: Channel) -> None:
        get = ctypes.pythonapi.PyCapsule_GetPointer
        get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        self._channel = channel
        self._ports: Any = _Ports.from_address(get(channel.ports, b"xvd.engine_ports"))
        self._data = ctypes.create_string_buffer(BLOCK)
        self._iov = (ctypes.c_uint64 * 2)(ctypes.addressof(self._data), BLOCK)
        self._io = _Io(op=EngineOp.READ, iovcnt=1, length=BLOCK, iov=ctypes.addressof(self._iov))

    def attach(self) -> None:
        self._ports.attach(self._ports.ctx, None)

    def begin_read(self) -> None:
        one = (ctypes.c_void_p * 1)(ctypes.addressof(self._io))
        self._ports.submit(self._ports.ctx, one, 1)

    def may_sleep(self) -> bool:
        return bool(self._ports.may_sleep(self._ports.ctx))

    def look_until_done(self) -> None:
        deadline = time.monotonic() + _PATIENCE_S
        while not self._ports.peek(self._ports.ctx):
            assert time.monotonic() < deadline

    def take(self) -> bool:
        """Take the read, if it has ended."""
        out = (ctypes.c_void_p * 1)()
        if self._ports.reap(self._ports.ctx, out, 1) == 0:
            return False
        assert (out[0], self._io.result) == (ctypes.addressof(self._io), 0)
        return True

    def is_told(self, seconds: float = 0) -> bool:
        """Whether its descriptor tells of something, which is heard then."""
        told = bool(select.select([self._ports.fd], [], [], seconds)[0])
        if told:
            os.read(self._ports.fd, 8)
        return told

    def take_once_told(self) -> None:
        """Sleep until the read has ended; a descriptor may tell of nothing, too."""
        assert self.is_told(_PATIENCE_S)
        while not self.take():
            assert self.is_told(_PATIENCE_S)
