# SPDX-License-Identifier: Apache-2.0
"""The C function tables through which a queue reaches the machine and the storage.

A queue imports no machine and no engine: whoever owns one fills a table and hands it over in a
capsule. Real Xen, the emulated machine and the simulator are each "somebody who fills the tables".
Every function is called without the GIL, by the one thread that steps the queue, and must not
block for longer than the work it is asked for.
"""

from cpython.buffer cimport Py_buffer
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from posix.uio cimport iovec


# ---- Grants of one peer, as the mapping side sees them ---------------------------------------

cdef struct grant_mapping:
    const uint32_t *grefs        # in: `count` references of the peer
    uint32_t count               # in: 1..; page i begins at base + i * stride
    uint32_t writable            # in: 0 or 1
    uint8_t *base                # out: first page; valid while mapped
    uint64_t handle              # out: what unmap needs
    int32_t status               # out: 0, or the GNTST of the first reference that failed

cdef struct grant_copy:
    uint8_t *local               # in: our side; `size` bytes
    uint32_t gref                # in: the peer's side
    uint16_t offset              # in: within the peer's page; offset + size <= 4096
    uint16_t size                # in: 1..4096
    uint8_t to_grant             # in: 1 writes into the grant, 0 reads from it
    int32_t status               # out: 0 or a GNTST value, each operation its own

cdef struct grant_ports:
    void *ctx
    # Bytes from one page of a mapping to the next. 4096, unless the pages of the kernel are larger:
    # each grant then takes one of those, and only its first 4096 bytes are the peer's.
    uint32_t stride
    # 0: unmap may return before the pages are gone. Linux's gntdev puts it off while somebody has a
    # reference to a page, and direct I/O drops its own after it has said that it is done
    # (dbe97cff).
    uint32_t unmaps_at_once
    # Map n sets of references. One set fails alone and then maps nothing.
    void (*map)(void *ctx, grant_mapping *sets, uint32_t n) noexcept nogil
    # Give back n sets whose status was 0; the pages are gone from this process, see above.
    void (*unmap)(void *ctx, grant_mapping *sets, uint32_t n) noexcept nogil
    void (*copy)(void *ctx, grant_copy *ops, uint32_t n) noexcept nogil
    # Give back n sets, as unmap does, and leave memory of our own in their place for whoever may
    # still write there; the caller unmaps that by munmap, when nobody does any more.
    void (*replace)(void *ctx, grant_mapping *sets, uint32_t n) noexcept nogil


# ---- Our own pages, granted to one peer ------------------------------------------------------

cdef struct granter_ports:
    void *ctx
    uint8_t *base                # `count` pages of our own memory
    uint32_t stride              # from each of them to the next, as in `grant_ports`
    const uint32_t *grefs        # page i is granted as grefs[i]
    uint32_t count
    uint32_t lasting             # 1: a grant lasts as long as the page; granting and revoking do
                                 # nothing
    void (*grant)(void *ctx, uint32_t page, uint32_t readonly) noexcept nogil
    # 0, or -1 while the peer still has the page mapped: then it may not be reused (XSA-396).
    int (*revoke)(void *ctx, uint32_t page) noexcept nogil


# ---- One event channel -----------------------------------------------------------------------

cdef struct event_ports:
    void *ctx
    int fd                       # polled by edges: each event ends a wait; -1: somebody else wakes
                                 # us
    void (*notify)(void *ctx) noexcept nogil
    # An event has come: let the next one in, at once or by what is put on the thread's io_uring to
    # be done with its next wait. 0: there was no room on that. The ring is to be looked at after
    # this.
    int (*acknowledge)(void *ctx, void *io_uring) noexcept nogil


# ---- The thread's io_uring ---------------------------------------------------------------------

cdef struct completion

# Who is told when an entry has completed: the entry's tag is the address of one of these.
cdef struct completion:
    void (*done)(completion *told, int32_t res) noexcept nogil
    void *ctx


# ---- Storage, as one queue sees it -----------------------------------------------------------

cdef enum engine_flag:
    ENGINE_SECURE = 1            # a discard after which nobody can read what was there
    ENGINE_ZEROES = 2            # a write of zeros: they need not be kept as data, which is there
                                 # all the same. An engine may take this off
    ENGINE_UNMAP = 4             # of such a write: nor need any space be kept for them

cdef struct engine_io:
    completion told              # the engine's; first: its address is the operation's
    uint8_t op                   # ENGINE_READ, ENGINE_WRITE, ENGINE_FLUSH or ENGINE_DISCARD
    uint8_t flags                # engine_flag
    uint16_t iovcnt
    int32_t result               # out: 0 or -errno; -EOPNOTSUPP: never ask for this kind again
    uint64_t offset              # bytes
    uint64_t length              # bytes; for reads and writes the sum of iov
    iovec *iov                   # the caller's, untouched until the operation is reaped; whoever
                                 # has it meanwhile may advance it to resume a short transfer, and
                                 # have it point to the same data elsewhere
    void *owner                  # the submitter's
    engine_io *next              # the engine's while it has the operation

cdef struct engine_ports:
    void *ctx
    int fd                       # readable when something completed behind our back; -1: none
    # Take n operations. Each comes back from reap exactly once, in any order, with a result.
    void (*submit)(void *ctx, engine_io **ios, uint32_t n) noexcept nogil
    uint32_t (*reap)(void *ctx, engine_io **done, uint32_t room) noexcept nogil
    # An engine that uses the thread's io_uring gets it here (struct io_uring *) before the first
    # submit, and tags each entry with its operation's completion.
    void (*attach)(void *ctx, void *io_uring) noexcept nogil
    # 1 if `reap` would give something, as far as one look tells. NULL: only `reap` tells.
    int (*peek)(void *ctx) noexcept nogil
    # Have the next completion told by `fd`, and look once more: 1 if the thread may sleep. After
    # the first such call nothing is told but after another, until the next `attach`: a thread that
    # looks anyway spares whoever completes the telling. NULL: all is told.
    int (*may_sleep)(void *ctx) noexcept nogil


# ---- Something that a thread steps -----------------------------------------------------------

cdef enum:
    PAGES_EACH = 4               # of data, for each request of a step's budget: few, so that both
                                 # ends work at once at large requests too

cdef struct stepper_ports:
    void *ctx
    # budget: requests of one step, and four times as many pages. What a step does is seen by the
    # other end when it is over. It returns STEP_* (types.py, `StepFlag`).
    uint32_t (*step)(void *ctx, uint32_t budget) noexcept nogil
    # Ask for an event and look once more: 1 if the thread may sleep, 0 if there is work after all.
    int (*may_sleep)(void *ctx) noexcept nogil
    # Between two steps that find nothing: 1 if the next one would, as far as one look at the ring
    # tells. NULL: only a step tells.
    int (*peek)(void *ctx) noexcept nogil
    event_ports *events
    engine_ports *engine         # NULL when there is none
    # When to step again though nothing happens, by the monotonic clock; 0: never. NULL: never.
    const uint64_t *due_ns
    # How many requests the other end has: while it has none, no event can have been lost. NULL: the
    # other end may send at any time.
    const uint32_t *outstanding


# ---- Operations of a frontend queue, and who has them done by its thread ----------------------

cdef struct client_ports
cdef struct client_host

cdef struct front_io

# How far a queue is with an operation.
cdef struct queue_part:
    uint32_t started             # some of it has been put on the ring
    uint32_t outstanding         # parts on the ring
    uint64_t issued              # sectors put on the ring so far
    uint32_t next_page           # of its pages, the first that is not on the ring yet
    front_io *follow             # which one the request with our last sector goes on with

# What the host of a client knows of its operation.
cdef struct client_part:
    client_ports *ports          # whose it is
    const client_host *host      # of one in place: whose pages it has
    uint32_t guarded             # a write that unaligned ones on its sectors wait for
    front_io *before             # in the list of those
    front_io *after

# What a caller asked for: any length, split into ring requests as slots become free. One request
# may carry the end of one operation and the beginning of the next.
cdef struct front_io:
    uint8_t operation            # in: BLKIF_OP_*, no indirect one
    uint8_t flag                 # in: of a discard
    uint8_t borrowed             # in: its memory is not the queue's to free
    int32_t error                # out: 0 or -errno, the worst of the parts
    uint64_t sector_number       # in: of 512 bytes
    uint64_t nr_sectors          # in
    uint8_t *buffer              # in: untouched until the operation is over; unused while in place
    uint32_t in_place            # granted pages that its data lies in; 0: none (front/place.pxd)
    uint32_t first_page          # of those, a chain
    uint64_t token               # in: the caller's
    front_io *next               # in whichever list it is
    queue_part queue
    client_part client
    Py_buffer view
    uint32_t has_view

# A queue, as what shares its thread sees it.
cdef struct client_host:
    void *ctx
    # Take a borrowed operation of a client: 1; it comes back by `completed`. 0: not on this queue,
    # or not now; the disk's own methods are the way for it.
    int (*submit)(void *ctx, front_io *io) noexcept nogil
    # Let a read's or write's data lie in granted pages, which its client fills before or reads
    # after, instead of in `buffer`: 1; 0 where there are too few for that. They are the client's
    # until `displace`, or until the host is over (`client_ports.displaced`).
    int (*place)(void *ctx, front_io *io) noexcept nogil
    void (*displace)(void *ctx, front_io *io) noexcept nogil
    # The bytes of such an operation's data from `offset` on, as at most `room` parts; how many.
    uint32_t (*parts)(void *ctx, const front_io *io, uint64_t offset, uint64_t size, iovec *parts,
                      uint32_t room) noexcept nogil

# Somebody with a descriptor and operations. Always called by one thread at a time, not always the
# same one: when a disk changes its backend, its clients move on to other queues.
cdef struct client_ports:
    void *ctx
    int fd
    # STEP_WORKED: something moved. STEP_DRAINED: over, and nothing under way.
    uint32_t (*step)(void *ctx, const client_host *host) noexcept nogil
    # CLIENT_* (types.py, `Wish`).
    uint32_t (*wishes)(void *ctx) noexcept nogil
    void (*completed)(void *ctx, front_io *io) noexcept nogil
    # Submit again, in the same order, what an earlier queue has taken and not completed.
    void (*resume)(void *ctx, const client_host *host) noexcept nogil
    # The host is over: let no operation lie in its pages any more. What they hold is to be copied
    # now, if it is wanted.
    void (*displaced)(void *ctx) noexcept nogil
    # After STEP_DRAINED, when nothing refers to the client any more; the last call.
    void (*left)(void *ctx) noexcept nogil
    # The host's:
    client_ports *next
    uint32_t waiting             # wishes that a poll is running for
    completion readable          # of those polls
    completion writable


# ---- Capsules: how a table travels through Python --------------------------------------------

cdef object wrap(void *table, const char *name)
cdef grant_ports *grants_of(object owner) except NULL
cdef granter_ports *granter_of(object owner) except NULL
cdef event_ports *events_of(object owner) except NULL
cdef engine_ports *engine_of(object owner) except NULL
cdef stepper_ports *stepper_of(object owner) except NULL
cdef client_ports *client_of(object owner) except NULL
