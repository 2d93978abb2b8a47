# SPDX-License-Identifier: Apache-2.0
"""A xenstore without I/O: connections put messages in, replies and watch events come out.

The idea to read it by: `Connection.handle` answers one request at once and completely, sending the
events that it causes, to whomever, in the same call and in the order in which C xenstored 4.17
would; nothing here waits, keeps time or knows a socket. Paths and tokens are str with one character
per byte (latin-1), values are bytes. The semantics are those of xenstore.txt and, where that is
silent, of C xenstored 4.17, which the tests run beside it. What is beyond it: a watch's depth.
What is missing: its limits on memory, rate and outstanding requests, which need a clock or a queue.
"""

from collections.abc import Callable

from xvd.errors import XenstoreError
from xvd.machine.emulated import xenstore_requests
from xvd.machine.emulated.xenstore_connection import Connection
from xvd.machine.emulated.xenstore_state import StoreState
from xvd.machine.xs.messages import Message
from xvd.types import Domid


class XenstoreStore(StoreState):
    """The store of one machine, to which its domains connect. One thread at a time."""

    def connect(
        self, domid: Domid, send: Callable[[Message], None], drop: Callable[[], None]
    ) -> Connection:
        """A new connection of a domain, which need not be introduced yet.

        `send` is called with each reply and event, `drop` if the domain is released: both at once,
        from within whatever call causes it, and they must not call back into the store. Raises
        `XenstoreError` ENOENT if there is no such domain.
        """
        domain = self.domains.find_or_add(domid, self.tree.generation)
        if domain is None:
            raise XenstoreError("ENOENT", f"there is no domain {domid}")
        connection = Connection(self, domain, send, drop, xenstore_requests.answer)
        self.add(connection)
        return connection
