# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, auto_pickle=False, embedsignature=True, binding=True
"""The backend's queue: a state machine with one step.

A request's way: `take` copies its slot once and judges the copy (taking.pxd); `resolve` maps its
grants, or copies the data of a write in (grants.pxd); `start` hands it to the engine; `collect`
takes what the engine has finished, copies the data of a read out, unmaps; `answer` writes the
response; `publish_responses` makes them visible, together (storage.pxd). Nothing here sleeps,
allocates or touches a Python object.

The descriptor is copied because the frontend may rewrite it while we look. The data is not (when
mapping): a guest that changes its own data in flight hurts only itself.

journal.pxd says what outlives this process, and why.
"""

from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from posix.unistd cimport close, read, write

from xvd.dataplane.abi cimport (
    BLKIF_MAX_INDIRECT_SEGMENTS, BLKIF_MAX_SEGMENTS_PER_REQUEST, BLKIF_OP_INDIRECT, REFUSAL_COUNT,
    STEP_BROKEN, STEP_DRAINED, STEP_EXCHANGED, STEP_WORKED, blkif_layouts, blkif_refusal_names)
from xvd.dataplane.back.buffers cimport shrink
from xvd.dataplane.back.grants cimport purge, purge_all, resolve, unmap
from xvd.dataplane.back.indirect cimport fetch_indirect
from xvd.dataplane.back.journal cimport (
    ENTRY_TAKEN, KIND_MASK, begin_journal, entries_of, fault_of, journal_header)
from xvd.dataplane.back.leaving cimport is_pinned, leave_ring
from xvd.dataplane.back.pending cimport (
    COPIES, GRANTS_PER_REQUEST, HELD, LEAVING, PAUSED, RUNNING, SETS, STOPPING, TAKING_OVER,
    backend_queue, pending)
from xvd.dataplane.back.persistent cimport NOBODY, close_book, open_book, persistent_grant
from xvd.dataplane.back.space cimport LARGE_SEGMENTS, SEGMENT_BYTES, close_pool, open_pool, space
from xvd.dataplane.back.storage cimport collect, publish_responses, refuse_marked, start, use_space
from xvd.dataplane.back.taking cimport admit, forget_limits, recover, take
from xvd.dataplane.back.throttle cimport Throttle
from xvd.dataplane.c cimport (
    monotonic_ns, xvd_clear_bits, xvd_load_acquire, xvd_store64, xvd_store_release)
from xvd.dataplane.latency cimport kind_figures, latency_lists, latency_sums
from xvd.dataplane.ports cimport (
    engine_io, engine_of, event_ports, events_of, grant_copy, grant_mapping, grants_of, wrap)
from xvd.dataplane.ring.ring cimport (
    back_attach, back_final_check, back_has_news, back_resume, back_take, check_ring, gap_of)

import os

from xvd.dataplane.back.journal import journal_size
from xvd.errors import LocalProtocolError, PeerProtocolError


def memory_of(uint32_t nr_ents, uint32_t indirect_max, uint32_t persistent_max):
    """Bytes that a queue takes when it is made; without the pages that data is copied through."""
    cdef uint32_t large = large_spaces(nr_ents, indirect_max), sets = max(nr_ents, <uint32_t>SETS)
    cdef size_t kept = max(persistent_max, GRANTS_PER_REQUEST * nr_ents) if persistent_max else 0
    kept *= sizeof(persistent_grant) + 5 * sizeof(uint32_t)
    return (nr_ents * (sizeof(pending) + 4 * sizeof(void *)
                       + BLKIF_MAX_SEGMENTS_PER_REQUEST * SEGMENT_BYTES)
            + large * (sizeof(space) + indirect_max * SEGMENT_BYTES) + kept
            + sets * (sizeof(grant_mapping) + sizeof(uint32_t)) + COPIES * sizeof(grant_copy)
            + journal_size(nr_ents))


cdef uint32_t large_spaces(uint32_t nr_ents, uint32_t indirect_max) noexcept nogil:
    """How many indirect requests may be in flight."""
    if indirect_max == 0:
        return 0
    return min(nr_ents, max(<uint32_t>1, <uint32_t>LARGE_SEGMENTS // indirect_max))


# ---- An event channel that nobody is on ------------------------------------------------------

cdef void notify_nobody(void *ctx) noexcept nogil:
    pass


cdef int acknowledge_nothing(void *ctx, void *io_uring) noexcept nogil:
    return 1


cdef event_ports nowhere
nowhere.ctx = NULL
nowhere.fd = -1
nowhere.notify = notify_nobody
nowhere.acknowledge = acknowledge_nothing


# ---- The step --------------------------------------------------------------------------------

cdef uint32_t take_new(backend_queue *q, uint32_t budget) noexcept nogil:
    """Into the batch with what a predecessor left, and after that with what is new. How many."""
    q.resume_ns = 0
    if q.recovering:
        recover(q)
        if q.recovering:
            return q.nr_batch
    return q.nr_batch + take(q, budget)


cdef uint32_t at_rest(backend_queue *q) noexcept nogil:
    """What a step says when nothing is in flight and nothing is taken."""
    cdef uint64_t one = 1
    if q.broken or q.halt == STOPPING:
        if q.persistent:
            purge_all(q)
        return STEP_BROKEN | STEP_DRAINED if q.broken else STEP_DRAINED
    if q.other_engine == NULL:
        if not q.rested:
            q.rested = 1
            if q.rest_fd >= 0:
                write(q.rest_fd, &one, 8)
        return 0
    q.engine = q.table.engine = q.other_engine
    q.other_engine = NULL
    return STEP_EXCHANGED


cdef uint32_t step(void *ctx, uint32_t budget) noexcept nogil:
    """One bounded round; STEP_* flags."""
    cdef backend_queue *q = <backend_queue *>ctx
    cdef uint32_t flags, moved = 0
    q.count.steps += 1
    if not q.given_time:
        q.now_ns = monotonic_ns()
    if q.halt == RUNNING and not q.broken:
        q.nr_batch = q.nr_indirect = 0
        if q.now_ns >= q.resume_ns or forget_limits(q):
            moved = take_new(q, budget)
        if q.nr_indirect:
            fetch_indirect(q)
            refuse_marked(q)
        admit(q)
        resolve(q)
        refuse_marked(q)
        start(q)
    elif q.halt == LEAVING:
        return leave_ring(q, &nowhere)
    moved += collect(q)
    publish_responses(q)
    shrink(q)
    if (q.halt != RUNNING or q.broken) and q.in_flight == 0:
        flags = at_rest(q)
        if flags:
            return flags
    if q.persistent and purge(q):
        moved += 1
    return STEP_WORKED if moved else 0


cdef uint64_t when_due(const backend_queue *q) noexcept nogil:
    """When to step again though nothing happens: to take on, or to let unused grants go."""
    cdef uint64_t due = q.resume_ns, unused
    if q.persistent and q.kept.idle_ns and q.kept.oldest != NOBODY:
        unused = q.kept.grants[q.kept.oldest].used_ns + q.kept.idle_ns
        due = min(due, unused) if due else unused
    return due


cdef int may_sleep(void *ctx) noexcept nogil:
    cdef backend_queue *q = <backend_queue *>ctx
    if q.halt == LEAVING:
        q.due_ns = 0
        return q.has_left and q.in_flight > 0
    q.due_ns = when_due(q)
    if q.broken or q.halt == STOPPING:
        return q.in_flight > 0
    if q.halt != RUNNING:
        return q.in_flight > 0 or q.other_engine == NULL
    if q.resume_ns:
        return True              # until then, and what is answered meanwhile wakes the thread
    if q.stalled:
        return q.in_flight > 0
    return not back_final_check(&q.ring)


cdef int peek(void *ctx) noexcept nogil:
    cdef backend_queue *q = <backend_queue *>ctx
    return q.resume_ns == 0 and back_has_news(&q.ring)


cdef check_offer(uint32_t offered, uint32_t indirect_max):
    """Refuse to make a queue that would answer OKAY to what it cannot do."""
    if indirect_max > BLKIF_MAX_INDIRECT_SEGMENTS:
        raise LocalProtocolError(f"indirect requests have at most {BLKIF_MAX_INDIRECT_SEGMENTS} "
                                 f"segments, not {indirect_max}")
    if bool(offered & (1 << BLKIF_OP_INDIRECT)) != bool(indirect_max):
        raise LocalProtocolError("indirect requests are offered with a number of segments, or not")


cdef class BackendQueue:
    """One queue of one disk, used by one thread at a time.

    ring: writable buffer over the ring pages, mapped by `grants`. abi: number of `blkif.abi.Abi`.
    grants, events, engine: objects with the tables' capsules as ``ports``; they are kept alive.
    options: a `BackOptions`. Where the grants' table says that unmapping takes its time, what would
    be mapped for one request is copied. journal: writable memory of `journal_size` bytes that
    outlives the process, or None. resume: a predecessor on the same ring left it, and it is taken
    up; otherwise a new one is begun there.

    Raises PeerProtocolError if the ring's indices are insane (more requests than entries), or the
    journal is not one of this ring, or is damaged (`journal.journal_fault`).
    """

    def __init__(self, ring, uint32_t nr_ents, int abi, grants, events, engine, options, *,
                 journal=None, bint resume=False):
        cdef uint8_t[::1] page = ring
        if journal is None:
            journal = bytearray(journal_size(nr_ents))
        if self.q.pendings != NULL:
            raise LocalProtocolError("a queue is made once")
        self.q.grants = grants_of(grants)
        check_ring(page.shape[0], nr_ents, abi, self.q.grants.stride)
        check_offer(options.offered, options.indirect_max)
        self.keep = (ring, grants, events, engine)
        self.throttles = set()
        self.q.ring.sring = &page[0]
        self.q.ring.gap = gap_of(nr_ents, abi, self.q.grants.stride)
        self.q.ring.nr_ents = nr_ents
        self.q.ring.layout = &blkif_layouts[abi]
        self.q.events = events_of(events)
        self.q.engine = engine_of(engine)
        self.q.limits.capacity = options.capacity
        self.q.limits.block_sectors = options.block_sectors
        self.q.limits.wire_sector = options.wire_sector
        self.q.limits.read_only = options.read_only
        self.q.limits.offered = options.offered
        self.q.limits.indirect_max = options.indirect_max
        self.q.persistent = options.persistent and not options.copying
        self.q.copying = options.copying or not (
            options.persistent or self.q.grants.unmaps_at_once)
        self.q.max_pages = options.max_pages
        self.set_persistent(options.persistent_max, options.persistent_idle_s)
        self.q.rest_fd = -1
        self.q.alarm_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.allocate(nr_ents)
        self.attach(journal, resume)
        self.q.table = &self.table
        self.table.ctx = &self.q
        self.table.step = step
        self.table.may_sleep = may_sleep
        self.table.peek = peek
        self.table.events = self.q.events
        self.table.engine = self.q.engine
        self.table.due_ns = &self.q.due_ns

    cdef attach(self, object journal, bint resume):
        """Start from the journal, or from what is on the ring. Called by the constructor."""
        cdef backend_queue *q = &self.q
        cdef uint8_t[::1] memory = journal
        cdef const char *fault
        cdef uint32_t i
        if memory.shape[0] < <Py_ssize_t>journal_size(q.ring.nr_ents):
            raise LocalProtocolError(f"a journal of {q.ring.nr_ents} requests has "
                                     f"{journal_size(q.ring.nr_ents)} bytes, not {memory.shape[0]}")
        self.keep += (journal,)
        q.journal = <journal_header *>&memory[0]
        for i in range(q.ring.nr_ents):
            q.pendings[i].entry = &entries_of(q.journal)[i]
        if not resume:
            if not back_attach(&q.ring):
                raise PeerProtocolError(f"the frontend has put more requests on the ring than its "
                                        f"{q.ring.nr_ents} entries hold")
            begin_journal(q.journal, &q.ring, int.from_bytes(os.urandom(8), "little") | 1)
            return
        fault = fault_of(q.journal, memory.shape[0], &q.ring)
        if fault[0]:
            raise PeerProtocolError(
                f"the journal of its ring is of no use: {(<bytes>fault).decode()}")
        back_resume(&q.ring, q.journal.req_cons, q.journal.rsp_prod_pvt)
        for i in range(q.ring.nr_ents):
            if (q.pendings[i].entry.word & KIND_MASK == ENTRY_TAKEN
                    and q.pendings[i].entry.index == q.journal.req_cons):
                back_take(&q.ring)
        q.recovering = TAKING_OVER

    cdef allocate(self, uint32_t nr_ents):
        cdef backend_queue *q = &self.q
        cdef uint32_t i, indirect_max = q.limits.indirect_max
        cdef uint32_t large = large_spaces(nr_ents, indirect_max)
        q.pendings = <pending *>calloc(nr_ents, sizeof(pending))
        q.free_list = <pending **>calloc(nr_ents, sizeof(void *))
        q.batch = <pending **>calloc(nr_ents, sizeof(void *))
        q.nr_sets = max(nr_ents, <uint32_t>SETS)
        q.sets = <grant_mapping *>calloc(q.nr_sets, sizeof(grant_mapping))
        q.fresh = <uint32_t *>calloc(q.nr_sets, sizeof(uint32_t))
        q.owners = <pending **>calloc(max(nr_ents, <uint32_t>COPIES), sizeof(void *))
        q.copies = <grant_copy *>calloc(COPIES, sizeof(grant_copy))
        q.ios = <engine_io **>calloc(nr_ents, sizeof(void *))
        if not (q.pendings and q.free_list and q.batch and q.sets and q.fresh and q.owners
                and q.copies and q.ios and (not q.persistent or self.open_kept())
                and open_pool(&q.small, nr_ents, BLKIF_MAX_SEGMENTS_PER_REQUEST)
                and open_pool(&q.large, large, indirect_max)):
            raise MemoryError(f"no memory for a queue of {nr_ents} requests")
        for i in range(nr_ents):
            q.free_list[i] = &q.pendings[i]
            q.pendings[i].own = &q.small.spaces[i]
            use_space(&q.pendings[i], q.pendings[i].own)
        q.nr_free = nr_ents

    cdef bint open_kept(self) except -1:
        """The book of persistent grants: for the limit, or for what Linux's frontend uses."""
        cdef uint32_t capacity = max(self.q.kept.limit, GRANTS_PER_REQUEST * self.q.ring.nr_ents)
        return open_book(&self.q.kept, capacity, int.from_bytes(os.urandom(4), "little"))

    def __dealloc__(self):
        close_pool(&self.q.small)
        close_pool(&self.q.large)
        free(self.q.pendings)
        free(self.q.free_list)
        free(self.q.batch)
        free(self.q.sets)
        free(self.q.fresh)
        close_book(&self.q.kept)
        free(self.q.owners)
        free(self.q.copies)
        free(self.q.ios)
        if self.q.alarm_fd > 0:
            close(self.q.alarm_fd)

    @property
    def ports(self):
        """Capsule ``xvd.stepper_ports``, for a `Loop`."""
        return wrap(&self.table, "xvd.stepper_ports")

    def step(self, uint32_t budget=64):
        """One bounded round, as the thread runs it; its `StepFlag`s."""
        cdef uint32_t flags
        with nogil:
            flags = step(&self.q, budget)
        return flags

    def may_sleep(self):
        """Ask for an event and look once more; True if there is nothing to do."""
        return bool(may_sleep(&self.q))

    def stop(self):
        """Take no more requests; those taken are finished by further steps. Any thread."""
        if self.q.halt != LEAVING:
            self.q.halt = STOPPING

    def pause(self, int rest_fd=-1):
        """Take no more requests until `resume`; those taken are finished. Any thread; wake its own.

        rest_fd: an eventfd that is written to when nothing is in flight any more, and after an
        `exchange`; the caller's, and to be kept until `resume`. A queue that was to stop does that.
        """
        if self.q.halt >= STOPPING:
            return
        self.q.rest_fd = rest_fd
        self.q.rested = 0
        xvd_store_release(&self.q.halt, PAUSED)

    def resume(self):
        """Take requests again, and begin again what was put back. Any thread; wake its own."""
        if self.q.halt < STOPPING:
            self.q.rest_fd = -1
            xvd_store_release(&self.q.halt, RUNNING)

    @property
    def held(self):
        """Whether it takes nothing because the storage was away."""
        return self.q.halt == HELD

    @property
    def quiet(self):
        """Whether nothing is in flight, and nothing will be until `resume`."""
        return self.q.halt != RUNNING and self.q.in_flight == 0

    def set_hold(self, bint holding):
        """Put back what fails because the storage is away, and take no more then; or answer it with
        an error. Any thread."""
        self.q.hold_errors = holding

    def exchange(self, engine):
        """Go on with other storage, an object as the constructor's. Only while it is paused or held
        and `quiet`; its next step does it (`exchanged`). Any thread; wake its own.
        """
        if not self.quiet or self.q.other_engine != NULL:
            raise LocalProtocolError("storage is exchanged while nothing is in flight, once")
        self.keep += (engine,)
        self.q.rested = 0
        self.q.other_engine = engine_of(engine)

    @property
    def exchanged(self):
        """Whether the last `exchange` is done: nothing refers to the storage before it."""
        return self.q.other_engine == NULL

    @property
    def is_pinned(self):
        """Whether the storage reads into pages of the frontend's. Any thread, while it is paused.
        """
        return is_pinned(&self.q)

    def leave(self):
        """Leave the ring, the journal and the event channel to a successor on the same journal,
        though the storage still has requests, and never touch a page of the frontend's again.

        Only of a paused queue, and not if storage that pins pages `is_pinned`. The successor may
        begin when this one `has_left`. Then it only waits for the storage, and is drained when that
        has ended all; until then keep that. Any thread; wake its own.
        """
        if self.q.halt != PAUSED:
            raise LocalProtocolError("only a paused queue leaves its ring")
        xvd_store_release(&self.q.halt, LEAVING)

    @property
    def has_left(self):
        """Whether its ring is a successor's."""
        return bool(xvd_load_acquire(&self.q.has_left))

    def release(self):
        """Unmap what was kept between requests. Only when nothing steps the queue any more, or it
        has left its ring: then there is nothing."""
        if self.q.halt == LEAVING:
            return
        self.q.broken = 1
        if self.q.persistent:
            purge_all(&self.q)

    def abandon(self):
        """What the system does for a process that died here: its mappings go, nothing is answered.

        For tests and the simulator: the queue is not to be used any more.
        """
        cdef uint32_t i
        cdef pending *p
        for i in range(self.q.ring.nr_ents):
            p = &self.q.pendings[i]
            unmap(&self.q, &p, 1)
        self.release()

    def set_time(self, uint64_t now_ns):
        """From now on this is the time, in nanoseconds, for tests and the simulator."""
        self.q.given_time = 1
        self.q.now_ns = now_ns

    def set_max_pages(self, uint32_t pages):
        """Change how many bounce pages stay in memory between requests. Any thread."""
        self.q.max_pages = pages

    def squeeze(self, double seconds):
        """Keep none of them for so long, from now on: memory is short. Any thread; wake its thread.
        """
        cdef uint64_t now = self.q.now_ns if self.q.given_time else monotonic_ns()
        self.q.squeezed_until_ns = now + <uint64_t>(seconds * 1e9)

    def set_persistent(self, uint32_t grants_max, double idle_s):
        """Change how many grants stay mapped, and for how long unused. Any thread; wake its own.

        More than there is memory for (33 for each entry of the ring, or what the queue was made
        with) are not kept.
        """
        self.q.kept.idle_ns = <uint64_t>(idle_s * 1e9)
        self.q.kept.limit = grants_max
        self.q.kept.next_scan_ns = 0  # an idle queue looks seldom: at its next step, not after it

    def set_throttles(self, Throttle own, Throttle group):
        """Go by these limits from the next request on; None: by none. Also after each of them was
        configured. Any thread; wake its own."""
        self.throttles.update((own, group))
        xvd_store64(&self.q.throttles[0], <uint64_t>(NULL if own is None else &own.t))
        xvd_store64(&self.q.throttles[1], <uint64_t>(NULL if group is None else &group.t))
        self.q.throttling = own is not None or group is not None
        xvd_store_release(&self.q.limits_changed, 1)

    def set_capacity(self, uint64_t sectors):
        """Change what is out of range for requests taken from now on. Any thread."""
        self.q.limits.capacity = sectors

    def withdraw(self, uint32_t offered):
        """Refuse what was offered by these bits, from the next request on. Any thread."""
        xvd_clear_bits(&self.q.limits.offered, offered)

    @property
    def withdrawn(self):
        """Bits as in ``offered`` for what the storage has answered EOPNOTSUPP to."""
        return self.q.withdrawn

    @property
    def copying(self):
        """Whether all data is copied: asked for, or all that this machine can do safely."""
        return bool(self.q.copying)

    @property
    def due_ns(self):
        """When to step again though nothing happens, as `set_time` counts; 0: not at all. As it was
        when it was last asked whether it may sleep."""
        return self.q.due_ns

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
        """Readable when storage has failed, or `withdrawn` has changed; once, until `failure`."""
        return self.q.alarm_fd

    def failure(self):
        """(errno of the last failure, failures so far); the alarm is set again."""
        cdef uint64_t count
        read(self.q.alarm_fd, &count, 8)
        self.q.alarmed = 0
        return -self.q.last_error, self.q.count.storage_errors

    def counters(self):
        """Everything counted, by name: blkback's names where it has them. Any thread.

        ``latency``: for each kind of request a list of 40 counts; count i is of those answered
        after 2**i nanoseconds and before twice that, from when they were taken off the ring.
        ``latency_ns``: the nanoseconds of all of them together.
        """
        counts = kind_figures(&self.q.kinds) | dict(self.q.count)
        refusals = counts.pop("refusals")
        counts["in_flight"] = self.q.in_flight
        counts["latency"] = latency_lists(&self.q.latency)
        counts["latency_ns"] = latency_sums(&self.q.latency)
        counts["buffer_pages"] = self.q.idle_pages
        counts["persistent_grants"] = self.q.kept.count
        counts["refusals"] = {
            (<bytes>blkif_refusal_names[i]).decode(): refusals[i]
            for i in range(1, REFUSAL_COUNT) if refusals[i]
        }
        return counts
