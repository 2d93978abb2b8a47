# SPDX-License-Identifier: Apache-2.0
# Inline header of export/.
"""One client's transmission: what it holds (transmission.pyx)."""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stddef cimport size_t

from xvd.dataplane.ports cimport client_ports, front_io
from xvd.export.memory cimport ExportMemory, export_memory

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *mutex, void *attr)
    int pthread_mutex_destroy(pthread_mutex_t *mutex)
    int pthread_mutex_lock(pthread_mutex_t *mutex)
    int pthread_mutex_unlock(pthread_mutex_t *mutex)


cdef enum:
    HEADER_SIZE = 28             # of a request
    HEAD_MAX = 32                # of a reply: a chunk of data begins with 28 bytes
    INPUT_SIZE = 64 * 1024

# The protocol's numbers (nbd_protocol.py); a test compares them.
cdef enum:
    REQUEST_MAGIC = 0x25609513
    COMMAND_READ = 0
    COMMAND_WRITE = 1
    COMMAND_DISC = 2
    COMMAND_FLUSH = 3
    FLAG_FUA = 1
    FLAG_DF = 4

cdef enum slot_state:
    SLOT_FREE = 0
    SLOT_FILLING = 1             # its payload is arriving
    SLOT_ON_QUEUE = 2
    SLOT_ASKED = 3               # with Python
    SLOT_ANSWERED = 4            # on its way back from there
    SLOT_READY = 5               # its reply is being sent

# How far a connection is; whether there are more requests decides what it may still become.
cdef enum progress:
    PROGRESS_HEADER = 0          # the next header is to come
    PROGRESS_PAYLOAD = 1         # or what is missing of the payload of `filling`
    PROGRESS_BLOCKED = 2         # the header is there, and no room for its request yet
    PROGRESS_OVER = 3            # no further request; those that were begun are answered
    PROGRESS_GONE = 4            # no further reply either: nobody is there to read it

# What Python has asked for.
cdef enum wanted:
    WANTED_MORE = 0
    WANTED_OVER = 1
    WANTED_GONE = 2

cdef enum news:
    NEWS_OVER = 1                # no further request will come
    NEWS_MALFORMED = 2           # because one made no sense; the connection is cut
    NEWS_GONE = 4                # nobody is there to read replies
    NEWS_EOF = 8                 # it sends no more, and has not said so before
    NEWS_LEFT = 16               # nothing is under way, and nothing refers to this any more

# A request, from its header to the last byte of its reply.
cdef struct slot:
    front_io io                  # first: the address of an operation is that of its slot
    uint32_t state
    uint32_t plain               # a queue may take it
    uint16_t flags, command
    uint32_t length
    int32_t error                # of the disk: Python has the words for it
    uint64_t cookie, offset
    uint64_t number              # in the order of arrival
    uint8_t *buffer              # payload, data read, or a long reply, unless `io` is in place
    size_t capacity
    size_t charge                # bytes of it that count against the client
    uint8_t head[HEAD_MAX]
    size_t head_size, body_size  # of the reply; the body is in the buffer
    slot *next

cdef struct slot_list:
    slot *first
    slot *last

cdef struct transmission_counters:
    uint64_t requests, bytes_read, bytes_written

cdef struct transmission:
    client_ports ports
    int fd
    uint32_t structured
    uint32_t requests_max, payload_max
    uint64_t bytes_max
    export_memory *memory        # that all clients of the export share
    uint64_t active_ns           # when bytes came or went for the last time
    slot *slots
    slot *free                   # last in, first out: the hot buffers stay hot
    uint32_t in_use
    uint32_t in_progress         # of those: not answered yet
    uint64_t held                # bytes charged
    uint64_t idle                # bytes of buffers in free slots
    uint64_t last_number
    uint32_t progress            # PROGRESS_*
    # Bytes in
    uint8_t *input
    size_t start, end
    slot *filling
    size_t filled
    uint32_t long_payloads       # read no further than the next header
    # Replies out
    slot_list ready
    size_t sent                  # of the first
    # Shared with Python's thread
    uint32_t wanted              # WANTED_*
    uint32_t answers             # there are some
    pthread_mutex_t mutex        # guards the rest
    slot_list asked, answered
    uint32_t tidings             # NEWS_* to be told
    int bell
    transmission_counters count


cdef inline void put(slot_list *slots, slot *s) noexcept nogil:
    s.next = NULL
    if slots.last == NULL:
        slots.first = s
    else:
        slots.last.next = s
    slots.last = s


cdef inline slot *take(slot_list *slots) noexcept nogil:
    cdef slot *s = slots.first
    if s != NULL:
        slots.first = s.next
        if slots.first == NULL:
            slots.last = NULL
    return s


cdef class Transmission:
    cdef transmission t
    cdef ExportMemory memory

    cdef described(self, slot *s)
    cdef put_reply(self, slot *s, tuple parts)
