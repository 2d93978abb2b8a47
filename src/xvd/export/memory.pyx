# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, auto_pickle=False, embedsignature=True, binding=True
"""What the clients of one export may hold together, for Python; memory.pxd has the rules."""

from libc.stdint cimport uint64_t
from posix.unistd cimport close

import os


cdef class ExportMemory:
    """Room for so many bytes of buffers. Any thread."""

    def __cinit__(self, uint64_t limit):
        self.m.limit = limit
        self.m.bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def __dealloc__(self):
        self.close()

    def close(self):
        """Give the bell back: when no client is left. Idempotent."""
        if self.m.bell > 0:
            close(self.m.bell)
        self.m.bell = -1

    @property
    def used(self):
        """Bytes of buffers that there are now."""
        return xvd_load64(&self.m.used)

    @property
    def starved(self):
        """Whether a client waits for room."""
        return bool(xvd_load_acquire(&self.m.starved))

    @property
    def bell(self):
        """Readable when one has begun to wait, or there may be room for it; to be read first."""
        return self.m.bell
