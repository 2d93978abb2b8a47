# SPDX-License-Identifier: Apache-2.0
"""Random conversations with a xenstore, held with two of them at once and compared word by word.

`Conversation.step` draws one operation, gives it to both, and reads every channel dry: a cheap
request on each is a barrier, as all that was sent before it comes before its reply. Only what C
xenstored answers by plan is drawn: after a payload without its NUL, for instance, it reports
whatever error was the last one anywhere.
"""

from dataclasses import dataclass, field, replace
from random import Random

from xenstored_oracle import Channel, Oracle, Ours, port_of

from xvd.machine.xs.messages import PAYLOAD_MAX, Message, MessageType

T = MessageType
DOMIDS = (1, 2, 3)
BARRIER_REQ_ID = 0xFFFF0000
LONG = "/" + "x" * 60
BAD_PATHS = [
    *("", "//", "/a/", "/a//b", "/a b", "/a\x80", "a.b", "@a", LONG * 40, "/a" + LONG * 50),
    *("/local/domain/1" + LONG * 33, "/local/domain/12345678" + LONG * 33, LONG * 3, LONG * 4),
]


@dataclass
class Client:
    """One client as both stores know it, and the transactions that it has open."""

    name: str
    domid: int
    theirs: Channel
    ours: Channel
    tx_ids: list[int] = field(default_factory=list)
    held: list[Message] = field(default_factory=list)
    """Messages of xenstored that were read already."""

    def close(self) -> None:
        self.theirs.close()
        self.ours.close()


def comparable(message: Message) -> Message:
    """The same, without what our store does not count: memory and outstanding requests."""
    if message.type != T.CONTROL or not message.payload.startswith(b"Domain "):
        return message
    lines = message.payload.decode().split("\n")
    kept = [line for line in lines if not line.startswith(("outstanding", "memory"))]
    return replace(message, payload="\n".join(kept).encode())


class Disagreement(AssertionError):
    """The two stores said different things."""


class Conversation:
    """Both stores, their clients, and the operations held so far."""

    def __init__(self, oracle: Oracle, ours: Ours, random: Random, targets: bool) -> None:
        self.oracle = oracle
        self.ours = ours
        self.random = random
        self.targets = targets
        """Draw SET_TARGET, and in exchange no end of a domain: C keeps a target alive."""
        self.operations = 0
        self.errors: dict[str, int] = {}
        self.events = 0
        self.history: list[str] = []
        self.alive: set[int] = set()
        self.clients: dict[str, Client] = {}
        for name in ("dom0a", "dom0b"):
            self.clients[name] = Client(name, 0, oracle.connect_dom0(), ours.connect_dom0())
        for domid in DOMIDS:
            self.create(domid)
            self.ask("dom0a", T.INTRODUCE, f"{domid}\0000\000{port_of(domid)}\0".encode())
            path = f"/local/domain/{domid}"
            self.ask("dom0a", T.MKDIR, f"{path}\0".encode())
            self.ask("dom0a", T.SET_PERMS, f"{path}\0n{domid}\0".encode())

    def close(self) -> None:
        for client in self.clients.values():
            client.close()

    def create(self, domid: int) -> None:
        self.history.append(f"create {domid}")
        self.oracle.create_domain(domid)
        self.ours.create_domain(domid)
        self.alive.add(domid)

    def kill(self, domid: int) -> None:
        self.history.append(f"kill {domid}")
        self.hang_up(domid)
        self.oracle.kill_domain(domid)
        self.ours.kill_domain(domid)
        self.alive.discard(domid)
        self.drain()

    def hang_up(self, domid: int) -> None:
        client = self.clients.pop(f"guest{domid}", None)
        if client is not None:
            client.close()

    def ask(self, name: str, kind: int, payload: bytes, tx_id: int = 0) -> Message:
        """One request to both stores; the answer they agree on."""
        client = self.clients[name]
        self.operations += 1
        request = Message(kind, self.operations, tx_id, payload)
        label = T(kind).name if kind in set(T) else str(kind)
        self.history.append(f"{name} {label} tx={tx_id} {payload[:80]!r} {len(payload)}")
        client.theirs.send(request)
        client.ours.send(request)
        if kind == T.RELEASE:
            self.settle_release(client)
        reply = self.receive_until(client, self.operations)
        self.note(client, kind, tx_id, payload, reply)
        self.drain()
        return reply

    def settle_release(self, client: Client) -> None:
        """Let what follows a RELEASE's reply at xenstored come before it, as it may do as well.

        It frees the released domain's connection at once or, if that is the one it looks at next,
        then: an accident of its main loop.
        """
        barrier = Message(T.GET_DOMAIN_PATH, BARRIER_REQ_ID, 0, b"0\0")
        replied = self.read(client.theirs, self.operations)
        client.theirs.send(barrier)
        late = self.read(client.theirs, BARRIER_REQ_ID)[:-1]
        client.held = [*replied[:-1], *late, replied[-1]]

    def receive_until(self, client: Client, req_id: int) -> Message:
        theirs, client.held = client.held or self.read(client.theirs, req_id), []
        theirs = [comparable(message) for message in theirs]
        ours = self.read(client.ours, req_id)
        if theirs != ours:
            recent = "\n".join(self.history[-25:])
            raise Disagreement(f"{recent}\n{client.name}: xenstored {theirs}\nours {ours}")
        self.events += len(theirs) - 1
        return theirs[-1]

    def read(self, channel: Channel, req_id: int) -> list[Message]:
        messages: list[Message] = []
        while not messages or messages[-1].req_id != req_id or messages[-1].type == T.WATCH_EVENT:
            try:
                messages.append(channel.receive())
            except OSError as error:
                recent = "\n".join(self.history[-25:])
                raise Disagreement(f"{recent}\n{channel}: {error}, {self.oracle.fate()}") from error
        return messages

    def drain(self) -> None:
        barrier = Message(T.GET_DOMAIN_PATH, BARRIER_REQ_ID, 0, b"0\0")
        for client in self.clients.values():
            client.theirs.send(barrier)
            client.ours.send(barrier)
        for client in self.clients.values():
            self.receive_until(client, BARRIER_REQ_ID)

    def note(self, client: Client, kind: int, tx_id: int, payload: bytes, reply: Message) -> None:
        """Keep up with what the answer means for later operations."""
        if reply.type == T.ERROR:
            code = reply.payload.rstrip(b"\0").decode()
            self.errors[code] = self.errors.get(code, 0) + 1
        if kind == T.TRANSACTION_START and reply.type == kind:
            client.tx_ids.append(int(reply.payload.rstrip(b"\0")))
        elif kind == T.TRANSACTION_END and payload in (b"T\0", b"F\0"):
            if tx_id in client.tx_ids:
                client.tx_ids.remove(tx_id)
        elif kind == T.RESET_WATCHES and reply.type == kind:
            client.tx_ids.clear()
        elif kind == T.RELEASE and reply.type == kind:
            self.hang_up(int(payload.rstrip(b"\0")))
        elif kind == T.INTRODUCE and reply.type == kind:
            domid = int(payload.split(b"\0")[0])
            if domid not in DOMIDS:
                return
            name = f"guest{domid}"
            if name in self.clients:
                self.clients[name].tx_ids.clear()
            else:
                theirs = self.oracle.connect_guest(domid)
                self.clients[name] = Client(name, domid, theirs, self.ours.connect_guest(domid))

    def step(self) -> None:
        """Draw one operation and hold it with both."""
        random = self.random
        if not self.targets and random.random() < 0.01:
            domid = random.choice(DOMIDS)
            if domid in self.alive:
                self.kill(domid)
            else:
                self.create(domid)
            return
        client = self.clients[random.choice(sorted(self.clients))]
        kind, payload = self.draw(client)
        tx_id = 0
        if client.tx_ids and random.random() < (0.8 if kind == T.TRANSACTION_END else 0.4):
            tx_id = random.choice(client.tx_ids)
        elif random.random() < 0.01:
            tx_id = 7777
        self.ask(client.name, kind, payload, tx_id)

    def draw(self, client: Client) -> tuple[int, bytes]:
        weights = {
            T.WRITE: 24, T.READ: 12, T.MKDIR: 8, T.RM: 7, T.DIRECTORY: 8, T.DIRECTORY_PART: 3,
            T.GET_PERMS: 6, T.SET_PERMS: 9, T.WATCH: 7, T.UNWATCH: 3, T.TRANSACTION_START: 6,
            T.TRANSACTION_END: 8, T.RESET_WATCHES: 0.3, T.GET_DOMAIN_PATH: 0.5,
            T.IS_DOMAIN_INTRODUCED: 0.5, T.INTRODUCE: 1.5, T.RESUME: 0.3, T.CONTROL: 1,
            T.SET_TARGET if self.targets else T.RELEASE: 0.5,
            T.WATCH_EVENT: 0.1, 20: 0.1, 23: 0.1, 4711: 0.1,
        }  # fmt: skip
        kind = self.random.choices(list(weights), list(weights.values()))[0]
        return kind, self.draw_payload(client, kind)

    def draw_payload(self, client: Client, kind: int) -> bytes:
        random = self.random
        path = self.draw_path()
        if kind == T.WRITE:
            request = f"{path}\0".encode() + self.draw_value()
            return request[:PAYLOAD_MAX] if random.random() > 0.02 else b"/a"
        if kind == T.DIRECTORY_PART:
            return f"{path}\0{random.choice([0, 0, 0, 1, 2, 4, 100])}\0".encode()
        if kind == T.SET_PERMS:
            # Not the root: C xenstored destroys the whole store if its owner dies.
            path = "/a" if path == "/" or path.startswith("@") else path
            if client.domid == 0 and random.random() < 0.05:
                path = random.choice(["@introduceDomain", "@releaseDomain"])
            return f"{path}\0".encode() + self.draw_perms()
        if kind in (T.WATCH, T.UNWATCH):
            if random.random() < 0.25:
                path = random.choice(["@introduceDomain", "@releaseDomain", "@other", "/"])
            return f"{path}\0{random.choice(['one', 'two'])}\0".encode()
        if kind == T.TRANSACTION_END:
            return random.choices([b"T\0", b"F\0", b"X\0", b"T"], [80, 18, 1, 1])[0]
        if kind in (T.TRANSACTION_START, T.RESET_WATCHES):
            return b"\0"
        domid = random.choice([*DOMIDS, *DOMIDS, 0, 9, 32752])
        if kind == T.INTRODUCE:
            port = port_of(domid) if random.random() < 0.9 else 0
            return f"{domid}\0000\000{port}\0".encode()
        if kind == T.SET_TARGET:
            return f"{domid}\0{random.choice([*DOMIDS, 9])}\0".encode()
        if kind in (T.RELEASE, T.RESUME, T.GET_DOMAIN_PATH, T.IS_DOMAIN_INTRODUCED):
            return f"{domid}\0".encode()
        if kind == T.CONTROL and domid in DOMIDS:
            return f"quota\0{domid}\0".encode()
        if kind == T.CONTROL:
            return random.choice(
                [b"check\0", b"print\0x\0", b"nonsense\0", b"quota\0set\0no\0001\0"]
            )
        return f"{path}\0".encode()

    def draw_path(self) -> str:
        random = self.random
        if random.random() < 0.04:
            return random.choice(BAD_PATHS)
        names = [random.choice("abc") for _ in range(random.choice([0, 1, 1, 2, 2, 3, 4]))]
        base = random.choice(
            ["/", "/", "", "/local/domain/1/", "/local/domain/2/", "/local/domain/3/"]
        )
        return (base + "/".join(names)).rstrip("/") or "/"

    def draw_value(self) -> bytes:
        random = self.random
        size = random.choice([0, 1, 1, 3, 3, 8, 8, 100, 260, 1900, 2016, 2040, 3000])
        return random.choice([b"v", b"\0", b"\xff", b"w"]) * size

    def draw_perms(self) -> bytes:
        random = self.random
        if random.random() < 0.05:
            return random.choice(
                [
                    b"",
                    b"x1\0",
                    b"n\0",
                    b"n1x\0",
                    b"n0x2\0",
                    b"r 1\0",
                    b"n-1\0",
                    b"b01\0r08\0",
                    b"n0\0r9\0",
                ]
            )
        count = random.choice([1, 1, 2, 2, 3, 4, 6])
        owners = [0, *DOMIDS] if random.random() < 0.5 else [*DOMIDS]
        entries = [f"{random.choice('nrwb')}{random.choice(owners)}\0" for _ in range(count)]
        return "".join(entries).encode()
