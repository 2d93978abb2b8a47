# SPDX-License-Identifier: Apache-2.0
# Inline header of export/.
"""From a client's bytes to requests: headers as many as one call brings, payloads to their places.

Nothing of the client's is believed: a header is copied into its slot field by field, and judged
there. What is not a plain read, write or flush is asked of Python, which knows every refusal.
"""

from libc.errno cimport EAGAIN, EINTR, errno
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memmove, memset
from posix.uio cimport iovec

from xvd.dataplane.abi cimport (
    BLKIF_OP_FLUSH_DISKCACHE, BLKIF_OP_READ, BLKIF_OP_WRITE, BLKIF_SECTOR_SIZE)
from xvd.dataplane.c cimport monotonic_ns, xvd_get16, xvd_get32, xvd_get64
from xvd.dataplane.ports cimport client_host
from xvd.export.transmission cimport (
    COMMAND_DISC, COMMAND_FLUSH, COMMAND_READ, COMMAND_WRITE, FLAG_DF, FLAG_FUA, HEADER_SIZE,
    INPUT_SIZE, NEWS_EOF, NEWS_GONE, NEWS_MALFORMED, NEWS_OVER, PROGRESS_BLOCKED, PROGRESS_HEADER,
    PROGRESS_OVER, PROGRESS_PAYLOAD, REQUEST_MAGIC, SLOT_FILLING, SLOT_ON_QUEUE, slot,
    transmission)
from xvd.export.transmission_ask cimport ask, end_input
from xvd.export.transmission_slots cimport copy_data, data_parts, has_room, take_slot

cdef extern from "<endian.h>" nogil:
    uint16_t be16toh(uint16_t v)
    uint32_t be32toh(uint32_t v)
    uint64_t be64toh(uint64_t v)

cdef extern from "<sys/socket.h>" nogil:
    struct msghdr:
        iovec *msg_iov
        size_t msg_iovlen
    ssize_t recvmsg(int fd, msghdr *message, int flags)
    enum:
        MSG_DONTWAIT

cdef enum:
    CALLS_MAX = 16               # to receive, in one step: other clients have their turn
    LONG = 16 * 1024             # payloads from this size on are received in their place
    PARTS = 64                   # of a payload, in one call


cdef inline bint is_plain(const slot *s) noexcept nogil:
    """Whether a queue may take it: nothing to be done after it, no part of a sector."""
    if s.command == COMMAND_FLUSH:
        return s.flags & ~FLAG_FUA == 0
    if s.command == COMMAND_READ:
        if s.flags & ~(FLAG_FUA | FLAG_DF):  # FUA means nothing for a read (proto, Command flags)
            return False
    elif s.command != COMMAND_WRITE or s.flags:
        return False
    return s.buffer != NULL and (s.offset | s.length) % BLKIF_SECTOR_SIZE == 0 and s.charge > 0


cdef inline uint8_t operation_of(uint16_t command) noexcept nogil:
    if command == COMMAND_READ:
        return BLKIF_OP_READ
    return BLKIF_OP_WRITE if command == COMMAND_WRITE else BLKIF_OP_FLUSH_DISKCACHE


cdef inline void prepare(transmission *t, slot *s, const client_host *host) noexcept nogil:
    """Make what a queue may take an operation, and give its data a place."""
    s.plain = is_plain(s)
    if not s.plain:
        return
    memset(&s.io, 0, sizeof(s.io))
    s.io.operation = operation_of(s.command)
    s.io.client.ports = &t.ports
    if s.command != COMMAND_FLUSH:
        s.io.sector_number = s.offset // BLKIF_SECTOR_SIZE
        s.io.nr_sectors = s.length // BLKIF_SECTOR_SIZE
        s.io.buffer = s.buffer
        host.place(host.ctx, &s.io)


cdef inline void launch(transmission *t, slot *s, const client_host *host) noexcept nogil:
    """A request is here whole: on the queue with it, or to Python."""
    if s.plain and host.submit(host.ctx, &s.io):
        s.state = SLOT_ON_QUEUE
    else:
        ask(t, s)


cdef inline void relaunch(transmission *t, slot *s, const client_host *host) noexcept nogil:
    """Send what one queue has taken and not completed to another, or to Python."""
    if not host.submit(host.ctx, &s.io):
        ask(t, s)


cdef inline bint begin(transmission *t, const client_host *host) noexcept nogil:
    """Take the header that is there; False: there is no room for its request yet."""
    cdef const uint8_t *at = t.input + t.start
    cdef uint16_t command = be16toh(xvd_get16(at + 6))
    cdef uint32_t length = be32toh(xvd_get32(at + 24))
    cdef uint32_t size
    cdef slot *s
    if be32toh(xvd_get32(at)) != REQUEST_MAGIC:
        end_input(t, NEWS_MALFORMED)
        return True
    if command == COMMAND_DISC:
        end_input(t, NEWS_OVER)
        return True
    if command == COMMAND_WRITE and length > t.payload_max:
        end_input(t, NEWS_MALFORMED)
        return True
    size = length if command <= COMMAND_WRITE and length <= t.payload_max else 0
    if not has_room(t, size):
        return False
    s = take_slot(t, size)
    if s == NULL:
        end_input(t, NEWS_GONE)
        return True
    t.count.requests += 1
    t.last_number += 1
    s.number = t.last_number
    s.flags = be16toh(xvd_get16(at + 4))
    s.command = command
    s.cookie = xvd_get64(at + 8)     # given back as it came
    s.offset = be64toh(xvd_get64(at + 16))
    s.length = length
    s.error = 0
    prepare(t, s, host)
    t.start += HEADER_SIZE
    t.long_payloads = command == COMMAND_WRITE and length >= LONG
    if command == COMMAND_WRITE and length:
        s.state = SLOT_FILLING
        t.progress = PROGRESS_PAYLOAD
        t.filling = s
        t.filled = 0
    else:
        launch(t, s, host)
    return True


cdef inline bint fill(transmission *t, const client_host *host) noexcept nogil:
    """Payload that came with headers goes to its place; False: more has to come."""
    cdef slot *s = t.filling
    cdef size_t size = min(t.end - t.start, s.length - t.filled)
    copy_data(s, t.filled, t.input + t.start, size, True)
    t.start += size
    t.filled += size
    if t.filled < s.length:
        return False
    t.progress = PROGRESS_HEADER
    t.filling = NULL
    launch(t, s, host)
    return True


cdef inline void take_units(transmission *t, const client_host *host) noexcept nogil:
    """Take every header and payload that is there and may be begun."""
    if t.progress == PROGRESS_BLOCKED:
        t.progress = PROGRESS_HEADER
    while t.progress < PROGRESS_OVER:
        if t.progress == PROGRESS_PAYLOAD:
            if not fill(t, host):
                return
        elif t.end - t.start < HEADER_SIZE:
            return
        elif not begin(t, host):
            t.progress = PROGRESS_BLOCKED
            return


cdef inline ssize_t receive_some(transmission *t, size_t *room) noexcept nogil:
    """One call: the rest of a payload to its place, what follows to the input."""
    cdef iovec parts[PARTS + 1]
    cdef msghdr message
    cdef ssize_t got
    cdef size_t payload = 0, left = 0
    cdef uint32_t n = 0, i
    memmove(t.input, t.input + t.start, t.end - t.start)
    t.end -= t.start
    t.start = 0
    memset(&message, 0, sizeof(message))
    if t.progress == PROGRESS_PAYLOAD:
        left = t.filling.length - t.filled
        n = data_parts(t.filling, t.filled, left, parts, PARTS)
    for i in range(n):
        payload += parts[i].iov_len
    room[0] = payload
    if payload == left:
        parts[n].iov_base = t.input + t.end
        parts[n].iov_len = (HEADER_SIZE if t.long_payloads else INPUT_SIZE) - t.end
        room[0] += parts[n].iov_len
        n += 1
    message.msg_iov = parts
    message.msg_iovlen = n
    got = recvmsg(t.fd, &message, MSG_DONTWAIT)
    if got > 0:
        t.active_ns = monotonic_ns()  # before any of it is held
        t.filled += min(<size_t>got, payload)
        t.end += <size_t>got - min(<size_t>got, payload)
    return got


cdef inline bint receive(transmission *t, const client_host *host) noexcept nogil:
    """Take what the client has sent; whether there was anything."""
    cdef uint32_t calls
    cdef size_t room
    cdef ssize_t got
    cdef bint moved = False
    for calls in range(CALLS_MAX):
        take_units(t, host)
        if t.progress >= PROGRESS_BLOCKED:
            break
        got = receive_some(t, &room)
        if got == 0:
            end_input(t, NEWS_EOF)
        elif got < 0 and errno not in (EAGAIN, EINTR):
            end_input(t, NEWS_GONE)
        if got <= 0:
            break
        moved = True
        if <size_t>got < room:  # all there was: the next call would come back with nothing
            take_units(t, host)
            break
    return moved
