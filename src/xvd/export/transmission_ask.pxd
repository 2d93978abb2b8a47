# SPDX-License-Identifier: Apache-2.0
# Inline header of export/.
"""What Python is asked and told; the bell rings once for many.

Python's thread is the only other one that touches a transmission: the two lists, the tidings and a
slot that is on either list, all under the mutex.
"""

from libc.stdint cimport uint32_t, uint64_t
from posix.unistd cimport write

from xvd.dataplane.c cimport xvd_load_acquire, xvd_store_release
from xvd.export.transmission cimport (
    COMMAND_WRITE, NEWS_GONE, NEWS_MALFORMED, NEWS_OVER, PROGRESS_GONE, PROGRESS_OVER, SLOT_ASKED,
    pthread_mutex_lock, pthread_mutex_unlock, put, slot, slot_list, take, transmission)
from xvd.export.transmission_slots cimport free_slot, make_ready, unplace

cdef extern from "<sys/socket.h>" nogil:
    int shutdown(int fd, int how)
    enum:
        SHUT_RDWR


cdef inline void ask(transmission *t, slot *s) noexcept nogil:
    """A request is Python's until it is answered. It sees the payload of a write that was not
    tried."""
    cdef uint64_t one = 1
    unplace(s, s.length if s.command == COMMAND_WRITE and s.error == 0 else 0)
    s.state = SLOT_ASKED
    pthread_mutex_lock(&t.mutex)
    if t.asked.first == NULL:
        write(t.bell, &one, 8)
    put(&t.asked, s)
    pthread_mutex_unlock(&t.mutex)


cdef inline void tell(transmission *t, uint32_t news) noexcept nogil:
    """Within the mutex the bell too: whoever hears that we have left may close it."""
    cdef uint64_t one = 1
    pthread_mutex_lock(&t.mutex)
    t.tidings |= news
    write(t.bell, &one, 8)
    pthread_mutex_unlock(&t.mutex)


cdef inline void drop_replies(transmission *t) noexcept nogil:
    cdef slot *s = take(&t.ready)
    while s != NULL:
        free_slot(t, s)
        s = take(&t.ready)
    t.sent = 0


cdef inline void end_input(transmission *t, uint32_t news) noexcept nogil:
    """No further request. With GONE or MALFORMED no further reply either: nobody reads it."""
    cdef bint gone = news & (NEWS_MALFORMED | NEWS_GONE)
    cdef uint32_t before = t.progress, after = PROGRESS_GONE if gone else PROGRESS_OVER
    if before >= after:
        return
    t.progress = after
    if gone:
        news |= NEWS_GONE
        shutdown(t.fd, SHUT_RDWR)
        drop_replies(t)
    if before < PROGRESS_OVER:
        news |= NEWS_OVER
    if t.filling != NULL:
        free_slot(t, t.filling)
        t.filling = NULL
    tell(t, news)


cdef inline bint take_answers(transmission *t) noexcept nogil:
    """Python's replies stand in line with the others; whether there were any."""
    cdef slot_list answered
    cdef slot *s
    if not xvd_load_acquire(&t.answers):
        return False
    pthread_mutex_lock(&t.mutex)
    xvd_store_release(&t.answers, 0)
    answered = t.answered
    t.answered.first = t.answered.last = NULL
    pthread_mutex_unlock(&t.mutex)
    s = take(&answered)
    while s != NULL:
        if t.progress == PROGRESS_GONE:
            free_slot(t, s)
        else:
            make_ready(t, s)
        s = take(&answered)
    return True
