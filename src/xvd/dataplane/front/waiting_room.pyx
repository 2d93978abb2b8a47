# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, auto_pickle=False, embedsignature=True, binding=True
"""Where a disk's clients are while there is no queue: served by the event loop, with each of their
operations going the long way, by the disk's own methods."""

from libc.stdint cimport uint32_t

from xvd.dataplane.front.clients cimport ClientSet, welcome_nobody
from xvd.dataplane.ports cimport client_ports


cdef class WaitingRoom(ClientSet):
    """Clients without a queue; all by one thread."""

    def give_up(self):
        """There will be no queue again: what is under way goes the long way."""
        cdef client_ports *client
        with nogil:
            welcome_nobody(&self.c)
            client = self.c.first
            while client != NULL:
                client.resume(client.ctx, &self.c.host)
                client = client.next
