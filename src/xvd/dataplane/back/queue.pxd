# SPDX-License-Identifier: Apache-2.0
"""One backend queue as a Python object; pending.pxd says what it holds."""

from libc.stdint cimport uint32_t

from xvd.dataplane.back.pending cimport backend_queue
from xvd.dataplane.ports cimport stepper_ports


cdef class BackendQueue:
    cdef backend_queue q
    cdef stepper_ports table
    cdef object keep             # what the tables hang off must live as long as the queue
    cdef set throttles           # its thread may still be using one of an earlier time

    cdef bint open_kept(self) except -1
    cdef allocate(self, uint32_t nr_ents)
    cdef attach(self, object journal, bint resume)
