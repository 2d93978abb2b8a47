# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, auto_pickle=False, embedsignature=True, binding=True
"""The backend's queue: a state machine with one step.

A request's way: `take` copies its slot once and judges the copy; `gather` maps its grants, or
copies the data of a write in; `start` hands it to the engine; `collect` takes what the engine has
finished, copies the data of a read out, unmaps; `answer` writes the response; `publish_responses`
makes them visible, together. Nothing here sleeps, allocates or touches a Python object.

The descriptor is copied because the frontend may rewrite it while we look. The data is not (when
mapping): a guest that changes its own data in flight hurts only itself.

journal.pxd says what outlives this process, and why.
"""

from libc.errno cimport EOPNOTSUPP
from libc.stdlib cimport calloc, free
from libc.string cimport memset
from posix.unistd cimport close, read, write

from xvd.dataplane.abi cimport (
    BLKIF_NR_ABI, BLKIF_OP_DISCARD, BLKIF_OP_FLUSH_DISKCACHE, BLKIF_OP_INDIRECT, BLKIF_OP_READ,
    BLKIF_OP_WRITE, BLKIF_OP_WRITE_BARRIER, BLKIF_PAGE_SIZE, BLKIF_RSP_EOPNOTSUPP,
    BLKIF_RSP_ERROR, BLKIF_RSP_OKAY, BLKIF_SECTOR_SIZE, REFUSAL_BAD_GRANT, REFUSAL_NONE,
    SRING_REQ_PROD, SRING_RSP_PROD, blkif_layouts, blkif_refusal_names, blkif_refusal_status)
from xvd.dataplane.c cimport DEBUG_ASSERT, aligned_pages, xvd_load_acquire, xvd_store_release
from xvd.dataplane.journal cimport (
    ENTRY_ANSWERING, ENTRY_FREE, ENTRY_TAKEN, JOURNAL_MAGIC, journal_entry, journal_header,
    mark_answering, mark_taken, strike)
from xvd.dataplane.ports cimport (
    ENGINE_DISCARD, ENGINE_FLUSH, ENGINE_READ, ENGINE_WRITE, STEP_BROKEN, STEP_DRAINED, STEP_WORKED,
    engine_of, events_of, grants_of, wrap)
from xvd.dataplane.request cimport OFFER_SECURE, parse, validate
from xvd.dataplane.ring cimport (
    RING_BROKEN, back_attach, check_ring, back_copy, back_final_check, back_pending, back_push, back_respond)

import os

from xvd.errors import LocalProtocolError, PeerProtocolError


def journal_size(nr_ents):
    """Bytes of a journal for a ring of so many entries."""
    return sizeof(journal_header) + nr_ents * sizeof(journal_entry)


def unanswered(const uint8_t[::1] ring):
    """Requests on a ring that have no response yet, by its shared indices."""
    cdef uint32_t req_prod = xvd_load_acquire(&ring[SRING_REQ_PROD])
    return <uint32_t>(req_prod - xvd_load_acquire(&ring[SRING_RSP_PROD]))


# ---- Answering -------------------------------------------------------------------------------

cdef void respond(backend_queue *q, pending *p, int16_t status) noexcept nogil:
    """Write the response and strike the request from the journal, in steps that can be resumed."""
    mark_answering(p.entry, q.ring.rsp_prod_pvt, status)
    back_respond(&q.ring, p.rq.id, p.rq.operation, status)
    strike(q.journal, p.entry, q.ring.rsp_prod_pvt)


cdef void answer(backend_queue *q, pending *p, int16_t status) noexcept nogil:
    """The one place where a request gets its one response."""
    DEBUG_ASSERT(q.in_flight > 0)
    respond(q, p, status)
    q.count.responses += 1
    if status != BLKIF_RSP_OKAY:
        q.count.errors += 1
    q.in_flight -= 1
    q.unpushed += 1
    q.free_list[q.nr_free] = p
    q.nr_free += 1


cdef void refuse(backend_queue *q, pending *p, int refusal) noexcept nogil:
    q.count.refusals[refusal] += 1
    answer(q, p, blkif_refusal_status[refusal])


cdef void publish_responses(backend_queue *q) noexcept nogil:
    if q.unpushed == 0:
        return
    q.unpushed = 0
    if back_push(&q.ring):
        q.count.notified += 1
        q.events.notify(q.events.ctx)
    else:
        q.count.suppressed += 1


# ---- Taking ----------------------------------------------------------------------------------

cdef uint32_t take(backend_queue *q, uint32_t budget) noexcept nogil:
    """Copy and judge new requests; those accepted are in `batch`. How many were taken."""
    cdef uint32_t count, i
    cdef pending *p
    if back_pending(&q.ring, &count) == RING_BROKEN:
        q.broken = 1
        return 0
    count = min(count, budget, q.nr_free)
    for i in range(count):
        q.nr_free -= 1
        p = q.free_list[q.nr_free]
        p.entry.index = q.ring.req_cons
        back_copy(&q.ring, p.entry.slot)
        mark_taken(q.journal, p.entry, q.ring.req_cons)
        q.in_flight += 1
        begin(q, p)
    q.count.requests += count
    return count


cdef void begin(backend_queue *q, pending *p) noexcept nogil:
    """Judge the private copy of a request; into the batch, or refused."""
    cdef int refusal
    parse(p.entry.slot, q.ring.layout, &p.rq)
    refusal = validate(&p.rq, &q.limits)
    if refusal != REFUSAL_NONE:
        refuse(q, p, refusal)
        return
    account(q, &p.rq)
    prepare(q, p)
    q.batch[q.nr_batch] = p
    q.nr_batch += 1


cdef void recover(backend_queue *q) noexcept nogil:
    """Take up what a predecessor left: finish the answer it was at, execute the rest again.

    At most one entry can be between two stores of `take`, and one between two of `respond`; the
    indices tell on which side. Executing again is right: the frontend was not told of any of them.
    """
    cdef uint32_t i
    cdef pending *p
    q.recovering = 0
    for i in range(q.ring.nr_ents):
        p = &q.pendings[i]
        if p.entry.state == ENTRY_ANSWERING:
            parse(p.entry.slot, q.ring.layout, &p.rq)
            if p.entry.index == q.ring.rsp_prod_pvt:
                respond(q, p, p.entry.status)
            xvd_store_release(&p.entry.state, ENTRY_FREE)
    q.nr_free = 0
    for i in range(q.ring.nr_ents):
        p = &q.pendings[i]
        if p.entry.state == ENTRY_TAKEN:
            q.in_flight += 1
            q.count.requests += 1
            q.count.recovered += 1
        else:
            q.free_list[q.nr_free] = p
            q.nr_free += 1
    for i in range(q.ring.nr_ents):
        if q.pendings[i].entry.state == ENTRY_TAKEN:
            begin(q, &q.pendings[i])
    q.unpushed += 1


cdef void account(backend_queue *q, const request *rq) noexcept nogil:
    if rq.operation == BLKIF_OP_READ:
        q.count.rd_req += 1
        q.count.rd_sect += rq.nr_sectors
    elif rq.operation == BLKIF_OP_WRITE:
        q.count.wr_req += 1
        q.count.wr_sect += rq.nr_sectors
    elif rq.operation == BLKIF_OP_DISCARD:
        q.count.ds_req += 1
        q.count.ds_sect += rq.nr_sectors
    else:
        q.count.f_req += 1
        q.count.wr_sect += rq.nr_sectors


cdef void prepare(backend_queue *q, pending *p) noexcept nogil:
    """Fill in what the engine will be asked; where the data lies is known after `gather`."""
    cdef uint32_t op = p.rq.operation
    p.second_stage = op == BLKIF_OP_FLUSH_DISKCACHE and p.rq.nr_segments > 0
    p.mapped = 0
    p.io.owner = p
    p.io.iov = p.iov
    p.io.iovcnt = 0
    p.io.offset = p.rq.sector_number * BLKIF_SECTOR_SIZE
    p.io.length = p.rq.nr_sectors * BLKIF_SECTOR_SIZE
    if op == BLKIF_OP_READ:
        p.io.op = ENGINE_READ
    elif op == BLKIF_OP_WRITE:
        p.io.op = ENGINE_WRITE
    elif op == BLKIF_OP_DISCARD:
        p.io.op = ENGINE_DISCARD
    else:
        p.io.op = ENGINE_FLUSH


# ---- Grants ----------------------------------------------------------------------------------

cdef void add_data(pending *p, uint8_t *at, size_t size) noexcept nogil:
    """Append to the transfer; what touches the part before joins it."""
    cdef iovec *last
    if p.io.iovcnt:
        last = &p.iov[p.io.iovcnt - 1]
        if <uint8_t *>last.iov_base + last.iov_len == at:
            last.iov_len += size
            return
    p.iov[p.io.iovcnt].iov_base = at
    p.iov[p.io.iovcnt].iov_len = size
    p.io.iovcnt += 1


cdef void drop_failed(backend_queue *q) noexcept nogil:
    """Refuse those of the batch whose grants could not be had (marked by `mapped` 2)."""
    cdef uint32_t i, kept = 0
    for i in range(q.nr_batch):
        if q.batch[i].mapped == 2:
            refuse(q, q.batch[i], REFUSAL_BAD_GRANT)
        else:
            q.batch[kept] = q.batch[i]
            kept += 1
    q.nr_batch = kept


cdef void map_batch(backend_queue *q) noexcept nogil:
    """Map the grants of the whole batch by one call; writable only what the storage writes to."""
    cdef uint32_t i, j, first, n = 0
    cdef pending *p
    for i in range(q.nr_batch):
        p = q.batch[i]
        if p.rq.nr_segments == 0:
            continue
        q.sets[n].grefs = p.rq.grefs
        q.sets[n].count = p.rq.nr_segments
        q.sets[n].writable = p.rq.operation == BLKIF_OP_READ
        q.owners[n] = p
        n += 1
    if n == 0:
        return
    q.grants.map(q.grants.ctx, q.sets, n)
    for i in range(n):
        p = q.owners[i]
        p.mapping = q.sets[i]
        p.mapped = 1 if p.mapping.status == 0 else 2
        if p.mapped == 2:
            continue
        q.count.mapped += p.mapping.count
        for j in range(p.rq.nr_segments):
            first = p.rq.first_sect[j] * BLKIF_SECTOR_SIZE
            add_data(p, p.mapping.base + j * BLKIF_PAGE_SIZE + first,
                     (p.rq.last_sect[j] - p.rq.first_sect[j] + 1) * BLKIF_SECTOR_SIZE)


cdef uint32_t add_copies(backend_queue *q, pending *p, uint32_t n, bint to_grant) noexcept nogil:
    """Describe the copy between a request's segments and its bounce buffer, packed."""
    cdef uint32_t j
    cdef uint8_t *at = p.bounce
    cdef grant_copy *op
    for j in range(p.rq.nr_segments):
        op = &q.copies[n]
        op.local = at
        op.gref = p.rq.grefs[j]
        op.offset = p.rq.first_sect[j] * BLKIF_SECTOR_SIZE
        op.size = (p.rq.last_sect[j] - p.rq.first_sect[j] + 1) * BLKIF_SECTOR_SIZE
        op.to_grant = to_grant
        q.owners[n] = p
        at += op.size
        n += 1
    return n


cdef void run_copies(backend_queue *q, uint32_t n) noexcept nogil:
    """Copy; a request of which one piece fails is marked (`mapped` 2)."""
    cdef uint32_t i
    if n == 0:
        return
    q.grants.copy(q.grants.ctx, q.copies, n)
    q.count.copied += n
    for i in range(n):
        if q.copies[i].status != 0:
            q.owners[i].mapped = 2


cdef void copy_batch(backend_queue *q) noexcept nogil:
    """Data of writes comes in now; reads go out in `collect`, and only when they succeeded."""
    cdef uint32_t i, n = 0
    cdef pending *p
    for i in range(q.nr_batch):
        p = q.batch[i]
        if p.rq.nr_segments == 0:
            continue
        add_data(p, p.bounce, p.io.length)
        if p.rq.operation != BLKIF_OP_READ:
            n = add_copies(q, p, n, False)
    run_copies(q, n)


cdef void gather(backend_queue *q) noexcept nogil:
    if q.copying:
        copy_batch(q)
    else:
        map_batch(q)
    drop_failed(q)


# ---- Storage ---------------------------------------------------------------------------------

cdef void start(backend_queue *q) noexcept nogil:
    cdef uint32_t i
    if q.nr_batch == 0:
        return
    for i in range(q.nr_batch):
        q.ios[i] = &q.batch[i].io
    q.engine.submit(q.engine.ctx, q.ios, q.nr_batch)


cdef uint32_t collect(backend_queue *q) noexcept nogil:
    """Take what the engine has finished to its response. How many."""
    cdef uint32_t n = q.engine.reap(q.engine.ctx, q.ios, q.ring.nr_ents)
    cdef uint32_t i, finished = 0
    cdef pending *p
    for i in range(n):
        p = <pending *>q.ios[i].owner
        if p.second_stage and p.io.result == 0:
            restart_as_write(q, p)
            continue
        q.batch[finished] = p
        finished += 1
    if q.copying:
        copy_reads_out(q, finished)
    else:
        unmap_finished(q, finished)
    for i in range(finished):
        p = q.batch[i]
        if p.mapped == 2:
            refuse(q, p, REFUSAL_BAD_GRANT)
        elif p.io.result == 0:
            answer(q, p, BLKIF_RSP_OKAY)
        elif p.io.result == -EOPNOTSUPP:
            answer(q, p, BLKIF_RSP_EOPNOTSUPP)
        else:
            alarm(q, p.io.result)
            answer(q, p, BLKIF_RSP_ERROR)
    return n


cdef void alarm(backend_queue *q, int32_t error) noexcept nogil:
    """Let the control plane know that storage fails: it can say so, this thread cannot."""
    cdef uint64_t one = 1
    q.last_error = error
    q.count.storage_errors += 1
    if not q.alarmed:
        q.alarmed = 1
        write(q.alarm_fd, &one, 8)


cdef void restart_as_write(backend_queue *q, pending *p) noexcept nogil:
    """A flush with data: what was written before is durable now, so the data may follow."""
    cdef engine_io *io = &p.io
    p.second_stage = 0
    io.op = ENGINE_WRITE
    q.engine.submit(q.engine.ctx, &io, 1)


cdef void copy_reads_out(backend_queue *q, uint32_t finished) noexcept nogil:
    cdef uint32_t i, n = 0
    for i in range(finished):
        if q.batch[i].rq.operation == BLKIF_OP_READ and q.batch[i].io.result == 0:
            n = add_copies(q, q.batch[i], n, True)
    run_copies(q, n)


cdef void unmap_finished(backend_queue *q, uint32_t finished) noexcept nogil:
    """Before the responses become visible: a frontend that sees one takes its grant back at once,
    and must not find the page still mapped."""
    cdef uint32_t i, n = 0
    for i in range(finished):
        if q.batch[i].mapped == 1:
            q.sets[n] = q.batch[i].mapping
            q.batch[i].mapped = 0
            q.count.unmapped += q.sets[n].count
            n += 1
    if n:
        q.grants.unmap(q.grants.ctx, q.sets, n)


# ---- The step --------------------------------------------------------------------------------

cdef uint32_t step(void *ctx, uint32_t budget) noexcept nogil:
    """One bounded round; STEP_* flags."""
    cdef backend_queue *q = <backend_queue *>ctx
    cdef uint32_t moved = 0
    q.count.steps += 1
    if not q.stopping and not q.broken:
        q.nr_batch = 0
        if q.recovering:
            recover(q)
        moved = q.nr_batch + take(q, budget)
        gather(q)
        start(q)
    moved += collect(q)
    publish_responses(q)
    if (q.stopping or q.broken) and q.in_flight == 0:
        return STEP_BROKEN | STEP_DRAINED if q.broken else STEP_DRAINED
    return STEP_WORKED if moved else 0


cdef int may_sleep(void *ctx) noexcept nogil:
    cdef backend_queue *q = <backend_queue *>ctx
    if q.stopping or q.broken:
        return q.in_flight > 0
    return not back_final_check(&q.ring)


cdef class BackendQueue:
    """One queue of one disk, used by one thread at a time.

    ring: writable buffer over the mapped ring pages. abi: number of `blkif.abi.Abi`. grants,
    events, engine: objects with the tables' capsules as ``ports``; they are kept alive. capacity:
    512-byte sectors. offered: bit ``1 << operation`` for each operation advertised, bit 16 for
    secure discard. copying: grant copy instead of mapping for each request. journal: writable memory
    of `journal_size` bytes that outlives the process, or None; one that a predecessor on the same
    ring left is taken up, anything else is to be zeroed by the caller.

    Raises PeerProtocolError if the ring's indices are insane (more requests than entries).
    """

    def __init__(self, ring, uint32_t nr_ents, int abi, grants, events, engine, *,
                 uint64_t capacity, uint32_t logical_sectors=1, bint read_only=False,
                 uint32_t offered=0x3, bint copying=False, journal=None):
        cdef uint8_t[::1] page = ring
        if journal is None:
            journal = bytearray(journal_size(nr_ents))
        if self.q.pendings != NULL:
            raise LocalProtocolError("a queue is made once")
        check_ring(page.shape[0], nr_ents, abi)
        # A barrier orders what is in flight and an indirect request has no segments of its own:
        # neither is served here, and an offer of either would be answered OKAY with data lost.
        if offered & ((1 << BLKIF_OP_WRITE_BARRIER) | (1 << BLKIF_OP_INDIRECT)):
            raise LocalProtocolError("barriers and indirect requests cannot be offered")
        self.keep = (ring, grants, events, engine)
        self.q.ring.sring = &page[0]
        self.q.ring.nr_ents = nr_ents
        self.q.ring.layout = &blkif_layouts[abi]
        self.q.grants = grants_of(grants)
        self.q.events = events_of(events)
        self.q.engine = engine_of(engine)
        self.q.limits.capacity = capacity
        self.q.limits.logical_sectors = logical_sectors
        self.q.limits.read_only = read_only
        self.q.limits.offered = offered
        self.q.copying = copying
        self.q.alarm_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.allocate(nr_ents)
        self.attach(self.open_journal(journal, nr_ents))
        self.table.ctx = &self.q
        self.table.step = step
        self.table.may_sleep = may_sleep
        self.table.events = self.q.events
        self.table.engine = self.q.engine

    cdef bint open_journal(self, object journal, uint32_t nr_ents) except -1:
        """Take the journal's memory; whether a predecessor's requests are in it."""
        cdef uint8_t[::1] memory = journal
        cdef journal_entry *entries
        cdef uint32_t i
        if memory.shape[0] < <Py_ssize_t>journal_size(nr_ents):
            raise LocalProtocolError(f"a journal of {nr_ents} requests has {journal_size(nr_ents)} "
                                     f"bytes, not {memory.shape[0]}")
        self.keep += (journal,)
        self.q.journal = <journal_header *>&memory[0]
        entries = <journal_entry *>(self.q.journal + 1)
        for i in range(nr_ents):
            self.q.pendings[i].entry = &entries[i]
        return self.q.journal.magic == JOURNAL_MAGIC and self.q.journal.nr_ents == nr_ents

    cdef attach(self, bint resume):
        """Start from the journal, or from what is on the ring. Called by the constructor."""
        cdef backend_queue *q = &self.q
        cdef uint32_t req_prod, i
        if resume:
            q.ring.req_cons, q.ring.rsp_prod_pvt = q.journal.req_cons, q.journal.rsp_prod_pvt
            for i in range(q.ring.nr_ents):
                if (q.pendings[i].entry.state == ENTRY_TAKEN
                        and q.pendings[i].entry.index == q.ring.req_cons):
                    q.ring.req_cons += 1
                    break
            q.recovering = 1
        req_prod = xvd_load_acquire(q.ring.sring + SRING_REQ_PROD)
        if not resume and not back_attach(&q.ring) or (
                <uint32_t>(req_prod - q.ring.rsp_prod_pvt) > q.ring.nr_ents):
            raise PeerProtocolError(f"the frontend has put more requests on the ring than its "
                                    f"{q.ring.nr_ents} entries hold")
        if not resume:
            memset(q.journal, 0, journal_size(q.ring.nr_ents))
            q.journal.nr_ents = q.ring.nr_ents
            q.journal.req_cons, q.journal.rsp_prod_pvt = q.ring.req_cons, q.ring.rsp_prod_pvt
            xvd_store_release(&q.journal.magic, JOURNAL_MAGIC)

    cdef allocate(self, uint32_t nr_ents):
        cdef backend_queue *q = &self.q
        cdef uint32_t i
        q.pendings = <pending *>calloc(nr_ents, sizeof(pending))
        q.free_list = <pending **>calloc(nr_ents, sizeof(void *))
        q.batch = <pending **>calloc(nr_ents, sizeof(void *))
        q.sets = <grant_mapping *>calloc(nr_ents, sizeof(grant_mapping))
        q.owners = <pending **>calloc(nr_ents * NR_SEGMENTS, sizeof(void *))
        q.copies = <grant_copy *>calloc(nr_ents * NR_SEGMENTS, sizeof(grant_copy))
        q.ios = <engine_io **>calloc(nr_ents, sizeof(void *))
        if q.copying:
            q.bounce = <uint8_t *>aligned_pages(nr_ents * NR_SEGMENTS)
        if not (q.pendings and q.free_list and q.batch and q.sets and q.owners and q.copies
                and q.ios and (q.bounce or not q.copying)):
            raise MemoryError(f"no memory for a queue of {nr_ents} requests")
        for i in range(nr_ents):
            q.free_list[i] = &q.pendings[i]
            if q.copying:
                q.pendings[i].bounce = q.bounce + <size_t>i * NR_SEGMENTS * BLKIF_PAGE_SIZE
        q.nr_free = nr_ents

    def __dealloc__(self):
        free(self.q.pendings)
        free(self.q.free_list)
        free(self.q.batch)
        free(self.q.sets)
        free(self.q.owners)
        free(self.q.copies)
        free(self.q.ios)
        free(self.q.bounce)
        if self.q.alarm_fd > 0:
            close(self.q.alarm_fd)

    @property
    def ports(self):
        """Capsule ``xvd.stepper_ports``, for a `Loop`."""
        return wrap(&self.table, "xvd.stepper_ports")

    def step(self, uint32_t budget=64):
        """One bounded round, as the thread runs it; STEP_* flags (1 worked, 2 broken, 4 drained)."""
        cdef uint32_t flags
        with nogil:
            flags = step(&self.q, budget)
        return flags

    def may_sleep(self):
        """Ask for an event and look once more; True if there is nothing to do."""
        return bool(may_sleep(&self.q))

    def stop(self):
        """Take no more requests; those taken are finished by further steps. Any thread."""
        self.q.stopping = 1

    def abandon(self):
        """What the system does for a process that died here: its mappings go, nothing is answered.

        For the simulator: the queue is not to be used any more.
        """
        cdef uint32_t i
        self.q.broken = 1
        for i in range(self.q.ring.nr_ents):
            if self.q.pendings[i].mapped == 1:
                self.q.grants.unmap(self.q.grants.ctx, &self.q.pendings[i].mapping, 1)
                self.q.pendings[i].mapped = 0

    def set_capacity(self, uint64_t sectors):
        """Change what is out of range for requests taken from now on. Any thread."""
        self.q.limits.capacity = sectors

    @property
    def in_flight(self):
        """Requests taken and not yet answered."""
        return self.q.in_flight

    @property
    def broken(self):
        """Whether the frontend broke the ring."""
        return bool(self.q.broken)

    @property
    def alarm_fd(self):
        """Readable when storage has failed; rung once, until `failure` is called."""
        return self.q.alarm_fd

    def failure(self):
        """(errno of the last failure, failures so far); the alarm is set again."""
        cdef uint64_t count
        read(self.q.alarm_fd, &count, 8)
        self.q.alarmed = 0
        return -self.q.last_error, self.q.count.storage_errors

    def counters(self):
        """Everything counted, by name: blkback's names where it has them. Any thread."""
        counts = dict(self.q.count)
        refusals = counts.pop("refusals")
        counts["in_flight"] = self.q.in_flight
        counts["refusals"] = {
            (<bytes>blkif_refusal_names[i]).decode(): refusals[i]
            for i in range(1, REFUSAL_COUNT) if refusals[i]
        }
        return counts
