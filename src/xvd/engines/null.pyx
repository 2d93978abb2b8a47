# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, auto_pickle=False, embedsignature=True, binding=True
"""Storage that is not there: reads give zeros, writes are forgotten. For measuring the rest."""

from libc.stdint cimport int32_t, uint32_t
from libc.string cimport memset

from xvd.dataplane.ports cimport ENGINE_READ, engine_io, engine_ports, wrap
from xvd.engines.channel cimport done_list, finish, reap_list

from xvd.engines.interface import Engine, EngineInfo, ThreadModel


cdef void submit(void *ctx, engine_io **ios, uint32_t n) noexcept nogil:
    cdef uint32_t i, j
    for i in range(n):
        if ios[i].op == ENGINE_READ:
            for j in range(ios[i].iovcnt):
                memset(ios[i].iov[j].iov_base, 0, ios[i].iov[j].iov_len)
        finish(<done_list *>ctx, ios[i], 0)


cdef uint32_t reap(void *ctx, engine_io **out, uint32_t room) noexcept nogil:
    return reap_list(<done_list *>ctx, out, room)


cdef void attach(void *ctx, void *io_uring) noexcept nogil:
    pass


cdef void complete(void *ctx, engine_io *io, int32_t res) noexcept nogil:
    pass


cdef class NullChannel:
    """`Channel` of `NullEngine`."""

    cdef done_list done
    cdef engine_ports table

    def __init__(self):
        self.table.ctx = &self.done
        self.table.fd = -1
        self.table.submit = submit
        self.table.reap = reap
        self.table.attach = attach
        self.table.complete = complete

    @property
    def ports(self):
        """Capsule ``xvd.engine_ports``."""
        return wrap(&self.table, "xvd.engine_ports")

    def close(self):
        """Nothing to give back."""


class NullEngine(Engine):
    """``null:SIZE``."""

    def __init__(self, size):
        self._info = EngineInfo(size=size, can_discard=True, thread_model=ThreadModel.PARALLEL)

    @property
    def info(self):
        """What this engine is."""
        return self._info

    def read(self, buffer, offset):
        """Zeros."""
        buffer[:] = bytes(len(buffer))

    def write(self, buffer, offset):
        """Forget."""

    def open_channel(self):
        """A compiled channel."""
        return NullChannel()
