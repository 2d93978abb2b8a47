# SPDX-License-Identifier: Apache-2.0
"""The part of liburing that is used."""

from libc.stdint cimport int32_t, uint16_t, uint32_t, uint64_t
from posix.uio cimport iovec


cdef extern from "liburing.h" nogil:
    struct __kernel_timespec:
        long long tv_sec
        long long tv_nsec

    struct io_uring_sqe:
        uint64_t user_data

    struct io_uring_cqe:
        uint64_t user_data
        int32_t res
        uint32_t flags

    struct io_uring:
        pass

    enum:
        IORING_CQE_F_MORE
        IORING_FSYNC_DATASYNC
        IORING_SETUP_CLAMP
        IOSQE_CQE_SKIP_SUCCESS

    int io_uring_queue_init(unsigned entries, io_uring *ring, unsigned flags)
    void io_uring_queue_exit(io_uring *ring)
    io_uring_sqe *io_uring_get_sqe(io_uring *ring)
    int io_uring_submit(io_uring *ring)
    unsigned io_uring_cq_ready(const io_uring *ring)
    unsigned io_uring_sq_ready(const io_uring *ring)
    unsigned io_uring_sq_space_left(const io_uring *ring)
    int io_uring_submit_and_wait_timeout(io_uring *ring, io_uring_cqe **cqe, unsigned wait_nr,
                                         __kernel_timespec *ts, void *sigmask)
    int io_uring_peek_cqe(io_uring *ring, io_uring_cqe **cqe)
    void io_uring_cqe_seen(io_uring *ring, io_uring_cqe *cqe)
    void io_uring_prep_read(io_uring_sqe *sqe, int fd, void *buffer, unsigned size, uint64_t offset)
    void io_uring_prep_write(io_uring_sqe *sqe, int fd, const void *buffer, unsigned size,
                             uint64_t offset)
    void io_uring_prep_readv(io_uring_sqe *sqe, int fd, const iovec *iov, unsigned n,
                             uint64_t offset)
    void io_uring_prep_writev(io_uring_sqe *sqe, int fd, const iovec *iov, unsigned n,
                              uint64_t offset)
    void io_uring_prep_fsync(io_uring_sqe *sqe, int fd, unsigned flags)
    void io_uring_prep_fallocate(io_uring_sqe *sqe, int fd, int mode, long long offset,
                                 long long length)
    void io_uring_prep_poll_add(io_uring_sqe *sqe, int fd, unsigned mask)
    void io_uring_prep_poll_multishot(io_uring_sqe *sqe, int fd, unsigned mask)
    void io_uring_prep_cancel64(io_uring_sqe *sqe, uint64_t user_data, int flags)
    void io_uring_sqe_set_flags(io_uring_sqe *sqe, unsigned flags)
    void io_uring_sqe_set_data64(io_uring_sqe *sqe, uint64_t data)
