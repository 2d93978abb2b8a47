# SPDX-License-Identifier: Apache-2.0
# Inline header of engines/.
"""What compiled channels share: mutexes, the list of finished operations, and the checking channel.
"""

from libc.errno cimport errno
from libc.stdint cimport int32_t, uint32_t, uint64_t
from libc.string cimport strerror
from posix.uio cimport iovec

from xvd.dataplane.ports cimport engine_io, engine_ports


cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *mutex, void *attr)
    int pthread_mutex_destroy(pthread_mutex_t *mutex)
    int pthread_mutex_lock(pthread_mutex_t *mutex)
    int pthread_mutex_unlock(pthread_mutex_t *mutex)


cdef extern from "sys/epoll.h" nogil:
    ctypedef union epoll_data_t:
        int fd
    struct epoll_event:
        uint32_t events
        epoll_data_t data
    enum:
        EPOLLIN
        EPOLLET
        EPOLL_CLOEXEC
        EPOLL_CTL_ADD
    int epoll_create1(int flags)
    int epoll_ctl(int epoll, int op, int fd, epoll_event *event)


cdef inline int either_fd(int one, int other, int *epoll_fd) except -2:
    """A descriptor that is readable when something new has come to one of two, each of which may
    be none (-1). epoll_fd: a new one that it took, for the caller to close."""
    cdef epoll_event event
    if one < 0 or other < 0:
        return max(one, other)
    epoll_fd[0] = epoll_create1(EPOLL_CLOEXEC)
    event.events = EPOLLIN | EPOLLET
    event.data.fd = one
    if (epoll_fd[0] < 0 or epoll_ctl(epoll_fd[0], EPOLL_CTL_ADD, one, &event) != 0
            or epoll_ctl(epoll_fd[0], EPOLL_CTL_ADD, other, &event) != 0):
        raise OSError(errno, f"no epoll is to be had: {strerror(errno).decode()}")
    return epoll_fd[0]


# Finished operations waiting to be reaped, oldest first.
cdef struct done_list:
    engine_io *first
    engine_io *last


cdef inline void finish(done_list *done, engine_io *io, int32_t result) noexcept nogil:
    io.result = result
    io.next = NULL
    if done.last == NULL:
        done.first = io
    else:
        done.last.next = io
    done.last = io


cdef inline uint32_t reap_list(done_list *done, engine_io **out, uint32_t room) noexcept nogil:
    cdef uint32_t n = 0
    while n < room and done.first != NULL:
        out[n] = done.first
        done.first = done.first.next
        n += 1
    if done.first == NULL:
        done.last = NULL
    return n


cdef struct checked:
    engine_ports *lower
    uint64_t size
    uint32_t block_mask
    uint32_t read_only
    uint32_t can_discard
    uint32_t can_secure_discard
    done_list done


cdef class CheckedChannel:
    cdef checked c
    cdef engine_ports table
    cdef object lower
    cdef object __weakref__
