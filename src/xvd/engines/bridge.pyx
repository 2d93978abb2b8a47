# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, auto_pickle=False, embedsignature=True, binding=True
"""Between a queue's thread and an engine written in Python.

The queue's thread hangs operations on a list and rings a bell; whoever serves the engine takes
them as `Operation` objects, performs them, and completes them, in any order. `ThreadedChannel` does
so with a worker thread. The simulator takes and completes by hand: that is how it decides when
storage answers, and what.
"""

from cpython.buffer cimport PyBUF_WRITE
from cpython.memoryview cimport PyMemoryView_FromMemory
from libc.stdint cimport int32_t, uint32_t, uint64_t
from posix.unistd cimport close, dup, read, write

from xvd.dataplane.abi cimport ENGINE_DISCARD, ENGINE_FLUSH, ENGINE_READ, ENGINE_WRITE
from xvd.dataplane.ports cimport (
    ENGINE_SECURE, ENGINE_UNMAP, ENGINE_ZEROES, engine_io, engine_ports, wrap)
from xvd.engines.channel cimport (
    done_list, finish, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock,
    pthread_mutex_t, pthread_mutex_unlock, reap_list)

import errno
import logging
import os
import threading

logger = logging.getLogger(__name__)


cdef struct bridge:
    pthread_mutex_t mutex        # guards both lists, for a few instructions
    done_list waiting            # submitted, not yet taken
    done_list done
    int work_fd                  # rung for the worker
    int done_fd                  # rung for the queue's thread


cdef void ring_bell(int fd) noexcept nogil:
    cdef uint64_t one = 1
    write(fd, &one, 8)


cdef void submit(void *ctx, engine_io **ios, uint32_t n) noexcept nogil:
    cdef bridge *b = <bridge *>ctx
    cdef uint32_t i
    pthread_mutex_lock(&b.mutex)
    for i in range(n):
        finish(&b.waiting, ios[i], 0)
    pthread_mutex_unlock(&b.mutex)
    ring_bell(b.work_fd)


cdef uint32_t reap(void *ctx, engine_io **out, uint32_t room) noexcept nogil:
    cdef bridge *b = <bridge *>ctx
    cdef uint32_t n
    pthread_mutex_lock(&b.mutex)
    n = reap_list(&b.done, out, room)
    pthread_mutex_unlock(&b.mutex)
    return n


cdef void attach(void *ctx, void *io_uring) noexcept nogil:
    pass


cdef class Operation:
    """One operation for a Python engine: its kind, its range, and its memory.

    kind: "read", "write", "flush" or "discard"; `secure` for a discard that erases; `zeroes` for a
    write that is known to be of zeros, and `unmap` for one that need not keep their space. The
    buffers are the guest's own pages when the backend maps: valid until `complete` and not a moment
    longer.
    """

    cdef engine_io *io
    cdef BridgeChannel channel
    cdef readonly str kind
    cdef readonly uint64_t offset, length
    cdef readonly bint secure, zeroes, unmap

    def buffers(self):
        """The parts of the transfer in order, as writable memoryviews of bytes."""
        if self.io == NULL:
            raise ValueError("the operation is completed: its memory is the guest's again")
        return [
            PyMemoryView_FromMemory(<char *>self.io.iov[i].iov_base, self.io.iov[i].iov_len,
                                    PyBUF_WRITE)
            for i in range(self.io.iovcnt)
        ]

    def complete(self, int32_t error=0):
        """End it: 0, or a positive errno. Once; any thread."""
        if self.io == NULL:
            raise ValueError("the operation is completed already")
        io, self.io = self.io, NULL
        self.channel.finish(io, -error)


KINDS = {ENGINE_READ: "read", ENGINE_WRITE: "write", ENGINE_FLUSH: "flush",
         ENGINE_DISCARD: "discard"}


cdef class BridgeChannel:
    """`Channel` whose operations are taken and completed by Python code."""

    cdef bridge b
    cdef engine_ports table

    def __cinit__(self, *args, **kwargs):
        pthread_mutex_init(&self.b.mutex, NULL)
        self.b.work_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self.b.done_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.table.ctx = &self.b
        self.table.fd = self.b.done_fd
        self.table.submit = submit
        self.table.reap = reap
        self.table.attach = attach

    def __dealloc__(self):
        close(self.b.work_fd)
        close(self.b.done_fd)
        pthread_mutex_destroy(&self.b.mutex)

    @property
    def ports(self):
        """Capsule ``xvd.engine_ports``."""
        return wrap(&self.table, "xvd.engine_ports")

    def wait(self):
        """Block until something may have been submitted, or `ring` was called."""
        cdef uint64_t count
        with nogil:
            read(self.b.work_fd, &count, 8)

    def ring(self):
        """Let `wait` return."""
        ring_bell(self.b.work_fd)

    def take(self):
        """All operations submitted and not yet taken, oldest first."""
        cdef engine_io *io
        cdef Operation operation
        taken = []
        pthread_mutex_lock(&self.b.mutex)
        io = self.b.waiting.first
        self.b.waiting.first = self.b.waiting.last = NULL
        pthread_mutex_unlock(&self.b.mutex)
        while io != NULL:
            operation = Operation.__new__(Operation)
            operation.io = io
            operation.channel = self
            operation.kind = KINDS[io.op]
            operation.offset, operation.length = io.offset, io.length
            operation.secure = io.flags & ENGINE_SECURE
            operation.zeroes = io.op == ENGINE_WRITE and io.flags & ENGINE_ZEROES
            operation.unmap = operation.zeroes and io.flags & ENGINE_UNMAP
            taken.append(operation)
            io = io.next
        return taken

    cdef finish(self, engine_io *io, int32_t result):
        pthread_mutex_lock(&self.b.mutex)
        finish(&self.b.done, io, result)
        pthread_mutex_unlock(&self.b.mutex)
        ring_bell(self.b.done_fd)

    def close(self):
        """Nothing runs here."""


def made_zero(engine, operation):
    """Whether an engine has let zeros do without data; they are written then if not."""
    if not operation.zeroes:
        return False
    try:
        engine.write_zeroes(operation.offset, operation.length, unmap=operation.unmap)
    except OSError:
        return False
    return True


def perform(engine, operation):
    """Do one operation on a Python engine and complete it; an engine's mistake is an I/O error."""
    try:
        at = operation.offset
        if operation.kind == "flush":
            engine.flush()
        elif operation.kind == "discard":
            erase = engine.secure_discard if operation.secure else engine.discard
            erase(at, operation.length)
        elif not made_zero(engine, operation):
            call = engine.read if operation.kind == "read" else engine.write
            for buffer in operation.buffers():
                call(buffer, at)
                at += len(buffer)
    except OSError as e:
        operation.complete(e.errno or errno.EIO)
    except Exception:
        logger.exception("%s failed in a way that engines may not: answered with an I/O error",
                         type(engine).__name__)
        operation.complete(errno.EIO)
    else:
        operation.complete()


class ThreadedChannel(BridgeChannel):
    """A worker thread that performs a queue's operations on a Python engine, one after another.

    For a SERIAL engine the calls of all its channels exclude each other.
    """

    def __init__(self, engine):
        self.engine = engine
        self.closing = False
        self.lock = serial_lock(engine)
        self.thread = threading.Thread(target=self.work, name="xvd-engine", daemon=True)
        self.thread.start()

    def work(self):
        """The thread: until closed."""
        while not self.closing:
            self.wait()
            for operation in self.take():
                with self.lock:
                    perform(self.engine, operation)

    def close(self):
        """End the thread; nothing may be in flight."""
        self.closing = True
        self.ring()
        self.thread.join()


def serial_lock(engine):
    """The lock that all channels of a SERIAL engine share; for others one that excludes nobody."""
    if engine.info.thread_model.value != "serial":
        return threading.Lock()
    if not hasattr(engine, "_serial_lock"):
        engine._serial_lock = threading.Lock()
    return engine._serial_lock
