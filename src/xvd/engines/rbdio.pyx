# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, auto_pickle=False, embedsignature=True, binding=True
"""A queue's way to a RADOS block device: librbd's asynchronous calls, from and to a guest's pages.

librbd is found at run time (rbd/library.py), so its calls come as addresses. It says in threads of
its own that an operation has ended: that is put on a list, and the queue's thread has a bell rung.
All channels of a disk share its image: a second handle would have to fight the first for the
exclusive lock.
"""

from libc.errno cimport ENOMEM
from libc.stdint cimport int32_t, uint32_t, uint64_t, uintptr_t
from posix.uio cimport iovec
from posix.unistd cimport close, write

from xvd.dataplane.abi cimport ENGINE_DISCARD, ENGINE_READ, ENGINE_WRITE
from xvd.dataplane.c cimport xvd_load64
from xvd.dataplane.ports cimport ENGINE_UNMAP, ENGINE_ZEROES, engine_io, engine_ports, wrap
from xvd.engines.channel cimport (
    done_list, finish, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock,
    pthread_mutex_t, pthread_mutex_unlock, reap_list)

import os

# rbd/librbd.h
ctypedef void (*ended_call)(void *completion, void *arg) noexcept nogil
ctypedef int (*create_call)(void *arg, ended_call ended, void **completion) noexcept nogil
ctypedef int (*vector_call)(void *image, const iovec *iov, int count, uint64_t offset,
                            void *completion) noexcept nogil
ctypedef int (*range_call)(void *image, uint64_t offset, uint64_t length,
                           void *completion) noexcept nogil
ctypedef int (*zeroes_call)(void *image, uint64_t offset, size_t length, void *completion,
                            int zero_flags, int op_flags) noexcept nogil
ctypedef int (*flush_call)(void *image, void *completion) noexcept nogil
ctypedef ssize_t (*result_call)(void *completion) noexcept nogil
ctypedef void (*release_call)(void *completion) noexcept nogil

CALLS = ("rbd_aio_create_completion", "rbd_aio_readv", "rbd_aio_writev", "rbd_aio_discard",
         "rbd_aio_flush", "rbd_aio_get_return_value", "rbd_aio_release")
"""What a channel calls, in the order of its addresses."""

ZEROES_CALL = "rbd_aio_write_zeroes"
"""What it calls as well where it is there, which is so from Ceph 16 on."""

cdef enum:
    THICK_PROVISION = 1          # RBD_WRITE_ZEROES_FLAG_THICK_PROVISION


cdef struct rbd:
    void *image
    create_call create
    vector_call readv
    vector_call writev
    range_call discard
    zeroes_call zeroes           # NULL: there is none
    flush_call flush
    result_call result
    release_call release
    pthread_mutex_t mutex        # guards the list, and the bell's life
    done_list done
    int bell
    uint32_t asked               # 1: for the bell, which is rung for nothing else
    uint32_t rings               # 1: the bell is rung for the next that ends


cdef void put(rbd *r, engine_io *io, int32_t result) noexcept nogil:
    cdef uint64_t one = 1
    pthread_mutex_lock(&r.mutex)
    if r.done.first == NULL and (r.rings or not r.asked):
        r.rings = 0
        write(r.bell, &one, 8)
    finish(&r.done, io, result)
    pthread_mutex_unlock(&r.mutex)


cdef void ended(void *completion, void *arg) noexcept nogil:
    """In a thread of librbd's. Reads say how many bytes there were, which are always all."""
    cdef engine_io *io = <engine_io *>arg
    cdef rbd *r = <rbd *>io.told.ctx
    cdef ssize_t result = r.result(completion)
    r.release(completion)
    put(r, io, <int32_t>result if result < 0 else 0)


cdef int begin(rbd *r, engine_io *io, void *completion) noexcept nogil:
    if io.op == ENGINE_READ:
        return r.readv(r.image, io.iov, io.iovcnt, io.offset, completion)
    if io.op == ENGINE_WRITE and io.flags & ENGINE_ZEROES and r.zeroes != NULL:
        return r.zeroes(r.image, io.offset, io.length, completion,
                        0 if io.flags & ENGINE_UNMAP else THICK_PROVISION, 0)
    if io.op == ENGINE_WRITE:
        return r.writev(r.image, io.iov, io.iovcnt, io.offset, completion)
    if io.op == ENGINE_DISCARD:
        return r.discard(r.image, io.offset, io.length, completion)
    return r.flush(r.image, completion)


cdef void submit(void *ctx, engine_io **ios, uint32_t n) noexcept nogil:
    cdef rbd *r = <rbd *>ctx
    cdef void *completion
    cdef uint32_t i
    cdef int result
    for i in range(n):
        ios[i].told.ctx = r
        if r.create(ios[i], ended, &completion) < 0:
            put(r, ios[i], -ENOMEM)
            continue
        result = begin(r, ios[i], completion)
        if result < 0:           # then nobody is told of its end
            r.release(completion)
            put(r, ios[i], result)


cdef uint32_t reap(void *ctx, engine_io **out, uint32_t room) noexcept nogil:
    cdef rbd *r = <rbd *>ctx
    cdef uint32_t n
    pthread_mutex_lock(&r.mutex)
    n = reap_list(&r.done, out, room)
    pthread_mutex_unlock(&r.mutex)
    return n


cdef void attach(void *ctx, void *io_uring) noexcept nogil:
    cdef rbd *r = <rbd *>ctx
    pthread_mutex_lock(&r.mutex)
    r.asked = 0
    pthread_mutex_unlock(&r.mutex)


cdef int peek(void *ctx) noexcept nogil:
    return xvd_load64(&(<rbd *>ctx).done.first) != 0


cdef int may_sleep(void *ctx) noexcept nogil:
    cdef rbd *r = <rbd *>ctx
    pthread_mutex_lock(&r.mutex)
    r.asked = r.rings = 1
    cdef bint nothing = r.done.first == NULL
    pthread_mutex_unlock(&r.mutex)
    return nothing


cdef class RbdChannel:
    """`Channel` to an image that is open and stays so. addresses: those of `CALLS`, and of
    `ZEROES_CALL` or 0."""

    cdef rbd r
    cdef engine_ports table

    def __cinit__(self, uintptr_t image, addresses):
        create, readv, writev, discard, flush, result, release, zeroes = addresses
        self.r.image = <void *>image
        self.r.create = <create_call><uintptr_t>create
        self.r.readv, self.r.writev = <vector_call><uintptr_t>readv, <vector_call><uintptr_t>writev
        self.r.discard = <range_call><uintptr_t>discard
        self.r.zeroes = <zeroes_call><uintptr_t>zeroes
        self.r.flush = <flush_call><uintptr_t>flush
        self.r.result = <result_call><uintptr_t>result
        self.r.release = <release_call><uintptr_t>release
        pthread_mutex_init(&self.r.mutex, NULL)
        self.r.bell = -1
        self.r.bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.table.ctx = &self.r
        self.table.fd = self.r.bell
        self.table.submit = submit
        self.table.reap = reap
        self.table.attach = attach
        self.table.peek = peek
        self.table.may_sleep = may_sleep

    def __dealloc__(self):
        pthread_mutex_lock(&self.r.mutex)  # who has told of the last one may still be in there
        pthread_mutex_unlock(&self.r.mutex)
        pthread_mutex_destroy(&self.r.mutex)
        if self.r.bell >= 0:
            close(self.r.bell)

    @property
    def ports(self):
        """Capsule ``xvd.engine_ports``."""
        return wrap(&self.table, "xvd.engine_ports")

    def close(self):
        """The image is the engine's; nothing may be in flight."""
