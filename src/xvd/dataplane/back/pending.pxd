# SPDX-License-Identifier: Apache-2.0
"""What one backend queue holds: requests between the ring and their responses, and its counters."""

from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t

from xvd.dataplane.abi cimport REFUSAL_COUNT
from xvd.dataplane.back.journal cimport journal_entry, journal_header
from xvd.dataplane.back.persistent cimport persistent_grants
from xvd.dataplane.back.request cimport request, request_limits
from xvd.dataplane.back.space cimport space, space_pool
from xvd.dataplane.back.throttle cimport THROTTLE_BUCKETS, THROTTLES, credit, throttle
from xvd.dataplane.latency cimport kind_counts, latencies
from xvd.dataplane.ports cimport (
    engine_io, engine_ports, event_ports, grant_copy, grant_mapping, grant_ports, stepper_ports)
from xvd.dataplane.ring.ring cimport back_ring


cdef enum:
    COPIES = 1024                # grant copies of one call; more are several calls
    SETS = 256                   # sets of one mapping or unmapping, at least
    GRANTS_PER_REQUEST = 33      # Linux's frontend: 32 segments and an indirect page
    PAUSE_NS = 1000000           # blkback's msleep(1) after a request that could not be mapped

# Whether a queue takes requests. PAUSED: by somebody's wish. HELD: the storage was away, and what
# it failed waits to be begun again.
cdef enum halting:
    RUNNING = 0
    PAUSED = 1
    HELD = 2
    STOPPING = 3                 # for good
    LEAVING = 4                  # and whatever is in flight: leaving.pxd

cdef enum recovery:
    RECOVERED = 0
    TAKING_OVER = 1              # the journal holds requests of a predecessor
    BEGINNING = 2                # some wait to be begun again


# Names as blkback's in sysfs where it has them.
cdef struct queue_counters:
    uint64_t oo_req
    uint64_t requests, responses, errors, storage_errors
    uint64_t mapped, unmapped, copied
    uint64_t map_calls, unmap_calls, copy_calls
    uint64_t buffer_pages_released
    uint64_t persistent_hits, persistent_misses, persistent_purged
    uint64_t notified, suppressed, steps, recovered, held, starved, throttled
    uint64_t refusals[REFUSAL_COUNT]

# A request between the ring and its response.
cdef struct pending:
    request rq
    journal_entry *entry
    uint32_t waiting             # 1: a predecessor's, or put back, and not begun
    uint32_t charged             # 1: the limits have counted it by its segments' number
    uint8_t to_ask               # of what its operation asks of the storage, how much is left
    grant_mapping mapping        # what is mapped for this request only
    uint32_t passing             # how many of its references are mapped for it only
    uint32_t copying             # 1: its data goes through pages of our own
    # What it has of its grants, and what became of them; side by side, so that a new request
    # clears all at once.
    uint8_t mapped               # 1: `mapping` is to be unmapped
    uint8_t holding              # 1: the persistent grants in `room.held` are to be released
    uint8_t refusal              # REFUSAL_*, once there is a reason to refuse it
    uint8_t starved              # 1: a grant was not had for want of room or memory of our own
    space *own                   # for a direct request's segments
    space *room                  # where this request's segments are: `own`, or a large one
    engine_io io
    uint64_t begun_ns            # when it was taken

cdef struct backend_queue:
    back_ring ring
    request_limits limits
    grant_ports *grants
    event_ports *events
    engine_ports *engine
    stepper_ports *table         # of this queue: its thread goes by the storage there
    uint32_t copying             # 1: grant copy for all; 0: mapping
    uint32_t persistent          # 1: keep what is mapped, as far as `kept` allows
    uint32_t halt                # `halting`
    uint32_t hold_errors         # 1: put back what fails because the storage is away
    engine_ports *other_engine   # takes the place of `engine` when nothing is in flight
    int rest_fd                  # written to when a halted queue has nothing in flight; -1: none
    uint32_t rested              # 1: that was done
    uint32_t has_left            # 1: the ring is its successor's
    uint32_t broken
    uint32_t withdrawn           # bits of `limits.offered` that the storage turned out not to do
    uint64_t resume_ns           # nothing is taken before; 0: no pause
    uint32_t throttling          # 1: one of `throttles` is not NULL
    uint32_t limits_changed      # 1: what is waited for is of other limits
    throttle *throttles[THROTTLES]           # each may be NULL
    credit credits[THROTTLES][THROTTLE_BUCKETS]
    uint64_t due_ns              # when a thread that sleeps is to step again; 0: not at all
    uint32_t stalled             # 1: the next request waits for something that is in flight
    pending *barrier             # in flight, and alone; NULL when there is none
    uint32_t in_flight           # taken and not yet answered
    uint32_t unpushed            # responses written and not yet published
    pending *pendings            # nr_ents of them
    pending **free_list
    uint32_t nr_free
    pending **batch              # requests accepted in this step
    uint32_t nr_batch
    uint32_t nr_indirect         # of those, with segments in pages of their own
    space_pool small             # one for each request
    space_pool large             # for the segments of indirect requests
    persistent_grants kept
    uint64_t now_ns              # as of the beginning of this step
    uint32_t given_time          # 1: `now_ns` is set from outside
    uint32_t max_pages           # bounce pages that are kept though nobody uses them
    uint32_t idle_pages          # how many those are now
    uint64_t squeezed_until_ns
    grant_mapping *sets          # scratch: sets of one grant call, `nr_sets` long
    uint32_t nr_sets
    uint32_t *fresh              # scratch, as long: persistent grants that are to be mapped
    uint32_t nr_fresh
    pending **owners             # whose each copy is
    grant_copy *copies           # scratch, COPIES long
    engine_io **ios
    journal_header *journal
    recovery recovering
    int alarm_fd                 # rung when storage fails or cannot, once until `failure` is asked
    uint32_t alarmed
    int32_t last_error           # -errno
    queue_counters count
    kind_counts kinds
    latencies latency            # from taking a request to answering it
