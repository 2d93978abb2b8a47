# SPDX-License-Identifier: Apache-2.0
# Inline header of export/.
"""From finished requests to bytes: as many replies as one call takes.

Replies leave whole and in the order in which they became ready; data goes from where the backend
has put it, or from the slot's buffer.
"""

from libc.errno cimport EAGAIN, EINTR, EOPNOTSUPP, errno
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset
from posix.uio cimport iovec

from xvd.dataplane.c cimport monotonic_ns, xvd_put16, xvd_put32, xvd_put64
from xvd.export.transmission cimport (
    COMMAND_FLUSH, COMMAND_READ, COMMAND_WRITE, NEWS_GONE, PROGRESS_GONE, slot, take, transmission)
from xvd.export.transmission_ask cimport ask, end_input
from xvd.export.transmission_in cimport MSG_DONTWAIT, msghdr
from xvd.export.transmission_slots cimport data_parts, free_slot, make_ready

cdef extern from "<endian.h>" nogil:
    uint16_t htobe16(uint16_t v)
    uint32_t htobe32(uint32_t v)
    uint64_t htobe64(uint64_t v)

cdef extern from "<sys/socket.h>" nogil:
    ssize_t sendmsg(int fd, const msghdr *message, int flags)
    enum:
        MSG_NOSIGNAL

cdef enum:
    SIMPLE_REPLY_MAGIC = 0x67446698
    STRUCTURED_REPLY_MAGIC = 0x668E33EF
    CHUNK_DONE = 1
    CHUNK_OFFSET_DATA = 1

cdef enum:
    PARTS = 512                  # of replies, in one call


cdef inline void put_simple(slot *s) noexcept nogil:
    xvd_put32(s.head, htobe32(SIMPLE_REPLY_MAGIC))
    xvd_put32(s.head + 4, 0)
    xvd_put64(s.head + 8, s.cookie)
    s.head_size = 16


cdef inline void put_data_chunk(slot *s) noexcept nogil:
    xvd_put32(s.head, htobe32(STRUCTURED_REPLY_MAGIC))
    xvd_put16(s.head + 4, htobe16(CHUNK_DONE))
    xvd_put16(s.head + 6, htobe16(CHUNK_OFFSET_DATA))
    xvd_put64(s.head + 8, s.cookie)
    xvd_put32(s.head + 16, htobe32(s.length + 8))
    xvd_put64(s.head + 20, htobe64(s.offset))
    s.head_size = 28


cdef inline void finish(transmission *t, slot *s) noexcept nogil:
    """The queue is done with a request. For what went wrong Python has the words; a flush that the
    backend does not know after all, the disk makes in another way."""
    if s.io.error:
        if s.command != COMMAND_FLUSH or s.io.error != -EOPNOTSUPP:
            s.error = s.io.error
        ask(t, s)
        return
    s.body_size = 0
    if s.command == COMMAND_WRITE:
        t.count.bytes_written += s.length
    elif s.command == COMMAND_READ:
        t.count.bytes_read += s.length
        s.body_size = s.length
    if t.progress == PROGRESS_GONE:
        free_slot(t, s)
        return
    if t.structured and s.body_size:
        put_data_chunk(s)
    else:
        put_simple(s)
    make_ready(t, s)


cdef inline size_t gather(const transmission *t, iovec *parts, uint32_t *count) noexcept nogil:
    """The unsent bytes of the first replies, as far as there is room for parts; how many."""
    cdef const slot *s = t.ready.first
    cdef size_t skip = t.sent, total = 0
    cdef uint32_t n = 0, i
    while s != NULL and n + 2 <= PARTS:
        if skip < s.head_size:
            parts[n].iov_base = <void *>(s.head + skip)
            parts[n].iov_len = s.head_size - skip
            n += 1
            skip = s.head_size
        if s.body_size:
            skip -= s.head_size
            n += data_parts(s, skip, s.body_size - skip, &parts[n], PARTS - n)
        skip = 0
        s = s.next
    for i in range(n):
        total += parts[i].iov_len
    count[0] = n
    return total


cdef inline void drop_sent(transmission *t, size_t size) noexcept nogil:
    """Free the slots of the replies that went out whole."""
    cdef slot *s
    t.sent += size
    while t.ready.first != NULL:
        s = t.ready.first
        if t.sent < s.head_size + s.body_size:
            return
        t.sent -= s.head_size + s.body_size
        free_slot(t, take(&t.ready))


cdef inline bint send(transmission *t) noexcept nogil:
    """Send what is ready, as far as the client has room for it; whether anything went."""
    cdef iovec parts[PARTS]
    cdef msghdr message
    cdef ssize_t sent
    cdef size_t total
    cdef uint32_t count
    cdef bint moved = False
    while t.ready.first != NULL:
        total = gather(t, parts, &count)
        memset(&message, 0, sizeof(message))
        message.msg_iov = parts
        message.msg_iovlen = count
        sent = sendmsg(t.fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL)
        if sent < 0:
            if errno not in (EAGAIN, EINTR):
                end_input(t, NEWS_GONE)
            break
        t.active_ns = monotonic_ns()  # before the client has nothing in progress any more
        drop_sent(t, sent)
        moved = True
        if <size_t>sent < total:
            break
    return moved
