# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, auto_pickle=False, embedsignature=True, binding=True
"""Storage that is not there: reads give zeros, writes are forgotten. For measuring the rest.

Zeros are data, and moving them costs what data cost. With `read_zeroes` off a read leaves the
guest's pages as they are, as Linux's null_blk does and QEMU's null-co without its option of that
name.
"""

from libc.stdint cimport uint32_t
from libc.string cimport memset

from xvd.dataplane.abi cimport ENGINE_READ
from xvd.dataplane.ports cimport engine_io, engine_ports, wrap
from xvd.engines.channel cimport done_list, finish, reap_list

from xvd.engines.interface import Engine, EngineInfo, Scheme, ThreadModel, no_files
from xvd.engines.text import parse_disk_size
from xvd.errors import ConfigError


cdef struct nothing:
    uint32_t read_zeroes
    done_list done


cdef void submit(void *ctx, engine_io **ios, uint32_t n) noexcept nogil:
    cdef nothing *c = <nothing *>ctx
    cdef uint32_t i, j
    for i in range(n):
        if ios[i].op == ENGINE_READ and c.read_zeroes:
            for j in range(ios[i].iovcnt):
                memset(ios[i].iov[j].iov_base, 0, ios[i].iov[j].iov_len)
        finish(&c.done, ios[i], 0)


cdef uint32_t reap(void *ctx, engine_io **out, uint32_t room) noexcept nogil:
    return reap_list(&(<nothing *>ctx).done, out, room)


cdef void attach(void *ctx, void *io_uring) noexcept nogil:
    pass


cdef class NullChannel:
    """`Channel` of `NullEngine`."""

    cdef nothing c
    cdef engine_ports table

    def __init__(self, bint read_zeroes):
        self.c.read_zeroes = read_zeroes
        self.table.ctx = &self.c
        self.table.fd = -1
        self.table.submit = submit
        self.table.reap = reap
        self.table.attach = attach

    @property
    def ports(self):
        """Capsule ``xvd.engine_ports``."""
        return wrap(&self.table, "xvd.engine_ports")

    def close(self):
        """Nothing to give back."""


class NullEngine(Engine):
    """``null:SIZE``, ``null:SIZE,read-zeroes=off``."""

    def __init__(self, size, read_zeroes=True):
        self._read_zeroes = read_zeroes
        self._info = EngineInfo(size=size, can_discard=True, thread_model=ThreadModel.PARALLEL)

    @property
    def info(self):
        """Its size, block sizes and abilities."""
        return self._info

    def read(self, buffer, offset):
        """Zeros, or what is there."""
        if self._read_zeroes:
            buffer[:] = bytes(len(buffer))

    def write(self, buffer, offset):
        """Forget."""

    def open_channel(self):
        """A compiled channel."""
        return NullChannel(self._read_zeroes)


READ_ZEROES = {"read-zeroes=on": True, "read-zeroes=off": False}


def open_uri(rest, how):
    """Open the text behind ``null:``: a size, and perhaps what a read does."""
    size, comma, word = rest.partition(",")
    if comma and word not in READ_ZEROES:
        raise ConfigError(f"null: takes {' or '.join(READ_ZEROES)} after its size, not {word!r}")
    return NullEngine(parse_disk_size(size), READ_ZEROES.get(word, True))


SCHEMES = (Scheme("null", "null:SIZE", "zeros, and writes that are forgotten", open_uri, no_files),)
