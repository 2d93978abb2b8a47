# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, auto_pickle=False, embedsignature=True, binding=True
"""An image file or a block device, by the queue thread's io_uring.

Two open descriptions of the same file: one with O_DIRECT, if the file allows it, for what is
aligned, and one through the page cache for the rest; the kernel keeps the two coherent. A discard
punches a hole, and so does a write that is known to be of zeros (`ENGINE_ZEROES`).

A flush is fdatasync. Linux tells each open description once that data could not be written back,
and has forgotten the data then: the next fdatasync succeeds and means nothing. So each channel
flushes a description of its own, which misses nothing that another was told, and after the first
failure no flush of the image is acknowledged any more (`Health`).

A file in memory (tmpfs) is read and written at once: io_uring would hand each operation to a thread
of the kernel, for a copy that takes less time than that.

Both hold a lock on the file that the kernel releases when the last operation in flight on that
description has ended, even if the process was killed: a successor that gets the lock cannot be
overtaken by a write of its predecessor.
"""

from libc.errno cimport EAGAIN, EINTR, EIO, EOPNOTSUPP, errno
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.string cimport strerror
from posix.uio cimport iovec

from xvd.dataplane.abi cimport ENGINE_DISCARD, ENGINE_FLUSH, ENGINE_READ, ENGINE_WRITE
from xvd.dataplane.c cimport xvd_exchange32, xvd_load_acquire
from xvd.dataplane.liburing cimport (
    IORING_FSYNC_DATASYNC, io_uring, io_uring_get_sqe, io_uring_prep_fallocate, io_uring_prep_fsync,
    io_uring_prep_read, io_uring_prep_readv, io_uring_prep_write, io_uring_prep_writev,
    io_uring_queue_exit, io_uring_queue_init, io_uring_sq_ready, io_uring_sqe,
    io_uring_sqe_set_data64, io_uring_submit)
from xvd.dataplane.ports cimport (
    ENGINE_UNMAP, ENGINE_ZEROES, completion, engine_io, engine_of, engine_ports, wrap)
from xvd.engines.channel cimport done_list, finish, reap_list

cdef extern from "<sys/uio.h>" nogil:
    ssize_t preadv(int fd, const iovec *iov, int n, long long offset)
    ssize_t pwritev(int fd, const iovec *iov, int n, long long offset)

cdef extern from "<unistd.h>" nogil:
    ssize_t pread(int fd, void *buffer, size_t size, long long offset)
    ssize_t pwrite(int fd, const void *buffer, size_t size, long long offset)
    int close_fd "close"(int fd)

cdef extern from "<sys/vfs.h>" nogil:
    struct statfs:
        long f_type
    int fstatfs(int fd, statfs *out)

cdef extern from "<linux/magic.h>" nogil:
    enum:
        TMPFS_MAGIC

cdef extern from "fcntl.h" nogil:
    enum:
        FALLOC_FL_PUNCH_HOLE
        FALLOC_FL_KEEP_SIZE
        FALLOC_FL_ZERO_RANGE
    int fallocate(int fd, int mode, long long offset, long long length)

cdef enum:
    IOV_MAX = 1024               # UIO_MAXIOV: the kernel refuses more parts in one operation
    SUBMITTED_AT_ONCE = 8        # the device begins with the first while the rest is prepared
    TRIES = 64                   # of an operation that the kernel puts off, and then it fails


cdef struct file_state:
    int direct_fd                # -1: the file does not do O_DIRECT
    int cached_fd
    int flush_fd                 # its own description: told of every failure
    uint32_t *flush_error        # the engine's: the errno of the first flush that failed, or 0
    uint32_t refused             # of zeros without data, what the file system has not: modes' bits
    uint64_t memory_mask         # of addresses and lengths for O_DIRECT
    uint64_t offset_mask
    io_uring *ring
    done_list done
    engine_ports *discards       # who performs discards; NULL: a file's are holes, by io_uring
    uint32_t in_memory           # nothing to wait for
    uint64_t direct, cached      # operations by each way


cdef bint aligned(const file_state *f, const engine_io *io) noexcept nogil:
    cdef uint32_t i
    if f.direct_fd < 0 or io.offset & f.offset_mask:
        return False
    for i in range(io.iovcnt):
        if <size_t>io.iov[i].iov_base & f.memory_mask or io.iov[i].iov_len & f.offset_mask:
            return False
    return True


cdef bint is_zeroing(const engine_io *io) noexcept nogil:
    """Whether it is a write of zeros, and no data need be written for it."""
    return io.op == ENGINE_WRITE and io.flags & ENGINE_ZEROES


cdef int zeroing_mode(bint unmap) noexcept nogil:
    """fallocate's mode."""
    return FALLOC_FL_KEEP_SIZE | (FALLOC_FL_PUNCH_HOLE if unmap else FALLOC_FL_ZERO_RANGE)


cdef int mode_of(const engine_io *io) noexcept nogil:
    return zeroing_mode(io.flags & ENGINE_UNMAP)


cdef void put_transfer(io_uring_sqe *sqe, int fd, engine_io *io) noexcept nogil:
    """Prepare a read or a write. What lies in one piece, as most does, is told so: the kernel then
    has no list to copy. What is beyond its limit is a short transfer, to be resumed as any other.
    """
    cdef uint32_t n = min(io.iovcnt, <uint32_t>IOV_MAX)
    if n == 1 and io.op == ENGINE_READ:
        io_uring_prep_read(sqe, fd, io.iov.iov_base, <uint32_t>io.iov.iov_len, io.offset)
    elif n == 1:
        io_uring_prep_write(sqe, fd, io.iov.iov_base, <uint32_t>io.iov.iov_len, io.offset)
    elif io.op == ENGINE_READ:
        io_uring_prep_readv(sqe, fd, io.iov, n, io.offset)
    else:
        io_uring_prep_writev(sqe, fd, io.iov, n, io.offset)


cdef void prepare(file_state *f, engine_io *io) noexcept nogil:
    """Put one operation, or what is left of it, on the thread's ring."""
    cdef io_uring_sqe *sqe = io_uring_get_sqe(f.ring)
    cdef int fd = f.cached_fd
    if sqe == NULL:
        io_uring_submit(f.ring)
        sqe = io_uring_get_sqe(f.ring)
    if sqe == NULL:
        finish(&f.done, io, -EAGAIN)
        return
    if io.op == ENGINE_FLUSH:
        io_uring_prep_fsync(sqe, f.flush_fd, IORING_FSYNC_DATASYNC)
    elif is_zeroing(io):
        io_uring_prep_fallocate(sqe, fd, mode_of(io), io.offset, io.length)
    elif io.op == ENGINE_DISCARD:
        io_uring_prep_fallocate(sqe, fd, zeroing_mode(True), io.offset, io.length)
    else:
        if aligned(f, io):
            fd = f.direct_fd
            f.direct += 1
        else:
            f.cached += 1
        put_transfer(sqe, fd, io)
    io.told.done = completed
    io.told.ctx = f
    io_uring_sqe_set_data64(sqe, <uint64_t><size_t>&io.told)


cdef void transfer(file_state *f, engine_io *io) noexcept nogil:
    """Read or write here and now."""
    cdef int n = min(io.iovcnt, <uint32_t>IOV_MAX)
    cdef ssize_t res
    f.cached += 1
    if n == 1 and io.op == ENGINE_READ:
        res = pread(f.cached_fd, io.iov.iov_base, io.iov.iov_len, io.offset)
    elif n == 1:
        res = pwrite(f.cached_fd, io.iov.iov_base, io.iov.iov_len, io.offset)
    elif io.op == ENGINE_READ:
        res = preadv(f.cached_fd, io.iov, n, io.offset)
    else:
        res = pwritev(f.cached_fd, io.iov, n, io.offset)
    complete(f, io, <int32_t>res if res >= 0 else -errno)


cdef void begin(file_state *f, engine_io *io) noexcept nogil:
    """One operation, or what is left of it."""
    if io.op == ENGINE_FLUSH and xvd_load_acquire(f.flush_error):
        finish(&f.done, io, -<int32_t>xvd_load_acquire(f.flush_error))
        return
    if is_zeroing(io) and f.refused & mode_of(io):
        io.flags &= ~<uint8_t>ENGINE_ZEROES
    if f.in_memory and (io.op == ENGINE_READ or io.op == ENGINE_WRITE) and not is_zeroing(io):
        transfer(f, io)
    else:
        prepare(f, io)


cdef void submit(void *ctx, engine_io **ios, uint32_t n) noexcept nogil:
    cdef file_state *f = <file_state *>ctx
    cdef uint32_t i
    for i in range(n):
        if ios[i].op == ENGINE_DISCARD and f.discards != NULL:
            f.discards.submit(f.discards.ctx, &ios[i], 1)
        else:
            ios[i].result = 0    # until it ends: how often the kernel has put it off
            begin(f, ios[i])
            if io_uring_sq_ready(f.ring) >= SUBMITTED_AT_ONCE:
                io_uring_submit(f.ring)


cdef uint32_t reap(void *ctx, engine_io **out, uint32_t room) noexcept nogil:
    cdef file_state *f = <file_state *>ctx
    cdef uint32_t n = reap_list(&f.done, out, room)
    if f.discards != NULL:
        n += f.discards.reap(f.discards.ctx, out + n, room - n)
    return n


cdef void attach(void *ctx, void *ring) noexcept nogil:
    (<file_state *>ctx).ring = <io_uring *>ring


cdef void advance(engine_io *io, uint64_t size) noexcept nogil:
    """Step over what has been transferred."""
    cdef uint64_t part
    io.offset += size
    io.length -= size
    while size:
        part = min(size, <uint64_t>io.iov[0].iov_len)
        io.iov[0].iov_base = <char *>io.iov[0].iov_base + part
        io.iov[0].iov_len -= part
        size -= part
        if io.iov[0].iov_len == 0:
            io.iov += 1
            io.iovcnt -= 1


cdef int32_t flushed(file_state *f, int32_t res) noexcept nogil:
    """Judge a flush: the first failure is remembered, and every later flush is one too."""
    if res < 0 and res != -EOPNOTSUPP and xvd_load_acquire(f.flush_error) == 0:
        xvd_exchange32(f.flush_error, <uint32_t>-res)
    return -<int32_t>xvd_load_acquire(f.flush_error) if res == 0 else res


cdef void zeroed(file_state *f, engine_io *io, int32_t res) noexcept nogil:
    """Zeros without data; where that cannot be had, they are data after all."""
    if res == 0:
        finish(&f.done, io, 0)
        return
    if res == -EOPNOTSUPP:
        f.refused |= mode_of(io) & ~FALLOC_FL_KEEP_SIZE
    io.flags &= ~<uint8_t>ENGINE_ZEROES
    begin(f, io)


cdef void completed(completion *told, int32_t res) noexcept nogil:
    """Go on with the operation that a completion is the first field of."""
    complete(<file_state *>told.ctx, <engine_io *>told, res)


cdef void complete(file_state *f, engine_io *io, int32_t res) noexcept nogil:
    """Judge a completion: an end, an error, or a short transfer that goes on."""
    if (res == -EINTR or res == -EAGAIN) and io.result < TRIES:
        io.result += 1
        begin(f, io)
    elif is_zeroing(io):
        zeroed(f, io, res)
    elif io.op == ENGINE_FLUSH:
        finish(&f.done, io, flushed(f, res))
    elif res < 0 or io.op == ENGINE_DISCARD:
        finish(&f.done, io, res if res < 0 else 0)
    elif <uint64_t>res >= io.length:
        finish(&f.done, io, 0)
    elif res == 0:
        finish(&f.done, io, -EIO)  # cut short behind our back: what was there is gone, not zeros
    else:
        advance(io, res)
        begin(f, io)


cdef bint is_in_memory(int fd) noexcept nogil:
    cdef statfs found
    return fstatfs(fd, &found) == 0 and found.f_type == TMPFS_MAGIC


cdef class Health:
    """Shared by all channels of an image: whether a flush of it has failed."""

    cdef uint32_t failed

    @property
    def flush_error(self):
        """The errno of the first flush that failed, or 0."""
        return xvd_load_acquire(&self.failed)

    def flush_failed(self, uint32_t number):
        """Remember it; the first one counts."""
        if xvd_load_acquire(&self.failed) == 0:
            xvd_exchange32(&self.failed, number)


cdef class FileChannel:
    """`Channel` of `image.FileEngine`, which owns the first two descriptors and `health`.

    flush_fd: for flushes, closed with this. discards: a channel that performs them instead of
    io_uring, closed with this one, or None.
    """

    cdef file_state f
    cdef engine_ports table
    cdef object worker
    cdef Health health

    def __init__(self, int direct_fd, int cached_fd, int flush_fd, Health health, *,
                 uint32_t memory_align, uint32_t offset_align, discards=None):
        self.worker = discards
        self.health = health
        self.f.discards = NULL if discards is None else engine_of(discards)
        self.f.direct_fd = direct_fd
        self.f.cached_fd = cached_fd
        self.f.flush_fd = flush_fd
        self.f.flush_error = &health.failed
        self.f.memory_mask = memory_align - 1
        self.f.offset_mask = offset_align - 1
        self.f.in_memory = is_in_memory(cached_fd)
        self.table.ctx = &self.f
        self.table.fd = -1 if self.f.discards == NULL else self.f.discards.fd
        self.table.submit = submit
        self.table.reap = reap
        self.table.attach = attach

    @property
    def ports(self):
        """Capsule ``xvd.engine_ports``."""
        return wrap(&self.table, "xvd.engine_ports")

    @property
    def counts(self):
        """Operations (direct, through the page cache)."""
        return self.f.direct, self.f.cached

    def close(self):
        """The other descriptors are the engine's; nothing may be in flight."""
        if self.worker is not None:
            self.worker.close()
        if self.f.flush_fd >= 0:
            close_fd(self.f.flush_fd)
        self.f.flush_fd = -1


cdef extern from *:
    """
    #include <stdint.h>
    #include <unistd.h>
    #include <sys/syscall.h>
    #include <linux/stat.h>
    #include <fcntl.h>
    #include <string.h>
    #ifndef STATX_DIOALIGN
    #define STATX_DIOALIGN 0x2000U
    #endif
    /* statx's stx_dio_mem_align and stx_dio_offset_align lie at 0x98 and 0x9c (linux/stat.h, 6.1);
     * by offset, because the header of an older system does not have them. */
    static int xvd_dio_align(int fd, uint32_t *memory, uint32_t *offset)
    {
        unsigned char buf[256];
        uint32_t mask;
        memset(buf, 0, sizeof buf);
        if (syscall(SYS_statx, fd, "", 0x1000 /* AT_EMPTY_PATH */, STATX_DIOALIGN, buf))
            return -1;
        memcpy(&mask, buf, 4);
        memcpy(memory, buf + 0x98, 4);
        memcpy(offset, buf + 0x9c, 4);
        return mask & STATX_DIOALIGN ? 0 : -1;
    }
    """
    int xvd_dio_align(int fd, uint32_t *memory, uint32_t *offset) nogil


def direct_alignment(int fd):
    """(memory, offset) alignment in bytes that O_DIRECT asks of this file.

    (0, 0) if the file does not do O_DIRECT; (4096, 4096) where the kernel cannot tell.
    """
    cdef uint32_t memory = 0, offset = 0
    if xvd_dio_align(fd, &memory, &offset) != 0:
        return 4096, 4096
    return memory, offset

def probe_io_uring():
    """Why io_uring is not to be had, or an empty text."""
    cdef io_uring ring
    cdef int rc = io_uring_queue_init(8, &ring, 0)
    if rc < 0:
        return strerror(-rc).decode()
    io_uring_queue_exit(&ring)
    return ""


def make_zero(int fd, bint unmap, long long offset, long long length):
    """Let a range read as zeros without writing data, and with `unmap` without space for them;
    raises OSError."""
    cdef int rc
    with nogil:
        rc = fallocate(fd, zeroing_mode(unmap), offset, length)
    if rc != 0:
        raise OSError(errno, f"cannot zero a range: {strerror(errno).decode()}")
