"""A proxy before PostgreSQL that understands its messages, and breaks connections where it is told.

What a client sends up to the message that is answered with "ready" (Sync, or a Query) is a
**round**. That message is the one which matters: before a Sync the server has carried out a
statement and committed nothing, and COMMIT is a Query. ``plan`` is asked at the end of every round
what is to become of it, when nothing of it has been passed on yet; rows to copy, which follow a
round, are passed on as they come.

    round: Bind, Execute | Sync         ->        CommandComplete, ReadyForQuery
       INSIDE^     BEFORE^     ^SENT         UNANSWERED^  ^HALF_ANSWERED        ^ANSWERED

A **cut** closes both sides at once. A **frozen** connection stays open on both sides and nothing is
passed on, not even that the client has left, until ``thaw``: then it goes on where it stood. So
what a client has given up can still reach the server, late.
"""

import asyncio
import re
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from enum import Enum
from random import Random
from typing import Final, NamedTuple

from tests.transport.peer import Pair


class Fault(Enum):
    """What is done to a round and its answer."""

    INSIDE = "cut in the middle of the question, anywhere"
    BEFORE = "cut before the last message of the question"
    SENT = "cut as soon as all is sent"
    UNANSWERED = "cut when the answer is there, before it is passed on"
    HALF_ANSWERED = "cut in the middle of the answer, anywhere"
    ANSWERED = "cut after the answer"
    LATE = "the client is cut off, and the question reaches the server after a thaw"
    FROZEN_BEFORE = "frozen before the last message of the question"
    FROZEN_AFTER = "frozen when the answer is there, before it is passed on"
    DELAYED = "the answer is passed on later"
    ROLLED_BACK = "COMMIT becomes ROLLBACK, as when its transaction has failed unnoticed"
    WARNED = "the answer comes with the warning of a wait for a standby that was cut short"


CUTS: Final = [*Fault][:7]
"""Those that end the connection by themselves, at once."""


class Round(NamedTuple):
    """What a client asks at once."""

    session: str
    """Its ``application_name``."""
    texts: Sequence[str]
    """What is to be run; empty when a statement is only prepared."""
    in_transaction: bool
    """Was a transaction open when it was sent?"""

    @property
    def commits(self) -> bool:
        """Does its last message commit something?"""
        if self.in_transaction:
            return "COMMIT" in self.texts
        return any(re.match("WITH|INSERT|UPDATE|DELETE", text) for text in self.texts)


class Proxy:
    """Listens on ``port`` while ``proxying``."""

    def __init__(self, server_port: int, random: Random) -> None:
        self.server_port = server_port
        self.random = random
        self.delay_seconds = 0.05
        self.port = 0
        self.plan: Callable[[Round], Fault | None] = lambda _: None
        self.done: list[tuple[Fault, Round]] = []
        """Everything that was done, in order."""
        self.still = False
        self._links: set[_Link] = set()
        self.thawed = asyncio.Event()
        """Set, and replaced, by the next ``thaw``."""

    def freeze(self) -> None:
        """Every connection stands still, and so will new ones."""
        self.still = True
        for link in self._links:
            link.frozen = True

    def thaw(self) -> None:
        """Everything that stands still goes on."""
        self.still = False
        for link in self._links:
            link.frozen = False
        self.thawed.set()
        self.thawed = asyncio.Event()

    @property
    def frozen(self) -> int:
        """Connections that stand still."""
        return sum(link.frozen for link in self._links)

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one client to its end."""
        try:
            server = await asyncio.open_connection("127.0.0.1", self.server_port)
        except OSError:
            await _close(writer)
            return
        self._links.add(link := _Link(self, (reader, writer), server))
        try:
            await link.run()
        finally:
            self._links.discard(link)

    async def end(self) -> None:
        """Close every connection, and wait until it is."""
        for link in set(self._links):
            await link.close()
        self.thaw()
        async with asyncio.timeout(10):
            while self._links:  # noqa: ASYNC110 - streams tell nobody when their task ends
                await asyncio.sleep(0.005)


@asynccontextmanager
async def proxying(server_port: int, random: Random) -> AsyncIterator[Proxy]:
    """A proxy before the PostgreSQL on ``server_port``; ``random`` says where "anywhere" is."""
    proxy = Proxy(server_port, random)
    listener = await asyncio.start_server(proxy.accept, "127.0.0.1", 0)
    proxy.port = listener.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        listener.close()
        await proxy.end()


class _Link:
    """One connection: a task for each direction."""

    def __init__(self, proxy: Proxy, client: Pair, server: Pair) -> None:
        self.frozen = proxy.still
        self._proxy = proxy
        self._from_client, self._to_client = client
        self._from_server, self._to_server = server
        self._statements: dict[bytes, str] = {}
        self._in_transaction = False
        self._fault: Fault | None = None

    async def run(self) -> None:
        """Until either side ends, or a fault ends both."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._up())
                group.create_task(self._down())
        except* (OSError, asyncio.IncompleteReadError):
            pass
        await self.close()

    async def close(self) -> None:
        """Whoever waits for something hears of it."""
        await _close(self._to_client)
        await _close(self._to_server)

    async def _up(self) -> None:
        session = await self._greet()
        question: list[bytes] = []
        texts: list[str] = []
        while True:
            message = await _read(self._from_client)
            texts += self._understand(message)
            question.append(message)
            if message[:1] in b"SQ":
                await self._ask(question, Round(session, tuple(texts), self._in_transaction))
                texts.clear()
            elif message[:1] in b"HdcfX":
                await self._pass(self._to_server, b"".join(question))
            else:
                continue
            question.clear()

    async def _greet(self) -> str:
        """Through the messages without a tag, without encryption; gives the session's name."""
        while True:
            (size,) = struct.unpack(">i", head := await self._from_client.readexactly(4))
            body = await self._from_client.readexactly(size - 4)
            (code,) = struct.unpack(">i", body[:4])
            if code not in (80877103, 80877104):
                break
            await self._pass(self._to_client, b"N")
        await self._pass(self._to_server, head + body)
        after = body.partition(b"\0application_name\0")[2]
        return after.partition(b"\0")[0].decode()

    def _understand(self, message: bytes) -> list[str]:
        """The text that this message runs, if it does."""
        first, _, rest = message[5:].partition(b"\0")
        second = rest.partition(b"\0")[0]
        match message[:1]:
            case b"P":
                self._statements[first] = second.decode()
            case b"B":
                return [self._statements[second]]
            case b"Q":
                return [first.decode()]
        return []

    async def _ask(self, question: Sequence[bytes], asked: Round) -> None:
        """Pass a round on, or what the plan leaves of it."""
        fault = self._proxy.plan(asked)
        self._fault = fault
        if fault is not None:
            self._proxy.done.append((fault, asked))
        whole, early = b"".join(question), b"".join(question[:-1])
        match fault:
            case Fault.INSIDE:
                whole = whole[: self._proxy.random.randrange(len(whole))]
            case Fault.BEFORE:
                whole = early
            case Fault.LATE:
                self._to_client.close()
                await self._stand_still()
            case Fault.FROZEN_BEFORE:
                await self._pass(self._to_server, early)
                whole = question[-1]
                await self._stand_still()
            case Fault.ROLLED_BACK:
                assert asked.texts == ("COMMIT",), "only a COMMIT can turn out to be none"
                whole = _message(b"Q", b"ROLLBACK\0")
        await self._pass(self._to_server, whole)
        if fault in (Fault.INSIDE, Fault.BEFORE, Fault.SENT):
            raise ConnectionAbortedError

    async def _down(self) -> None:
        answer: list[bytes] = []
        while True:
            message = await _read(self._from_server)
            if message[:1] == b"Z":
                self._in_transaction = message[5:] != b"I"
            answer.append(message)
            if self._fault is None or message[:1] in b"ZG":
                await self._answer(b"".join(answer), self._fault)
                answer.clear()
                self._fault = None

    async def _answer(self, whole: bytes, fault: Fault | None) -> None:
        """Pass an answer on, or what ``fault`` leaves of it."""
        match fault:
            case Fault.UNANSWERED:
                raise ConnectionAbortedError
            case Fault.HALF_ANSWERED:
                whole = whole[: self._proxy.random.randrange(len(whole))]
            case Fault.FROZEN_AFTER:
                await self._stand_still()
            case Fault.DELAYED:
                await asyncio.sleep(self._proxy.delay_seconds)
            case Fault.WARNED:
                whole = _WARNING + whole
        await self._pass(self._to_client, whole)
        if fault in (Fault.HALF_ANSWERED, Fault.ANSWERED):
            raise ConnectionAbortedError

    async def _pass(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        while self.frozen:
            await self._proxy.thawed.wait()
        if writer.is_closing():
            raise ConnectionAbortedError
        writer.write(data)
        await writer.drain()

    async def _stand_still(self) -> None:
        self.frozen = True
        await self._proxy.thawed.wait()


async def _read(reader: asyncio.StreamReader) -> bytes:
    """The next message with a tag."""
    head = await reader.readexactly(5)
    return head + await reader.readexactly(int.from_bytes(head[1:]) - 4)


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()


def _message(tag: bytes, body: bytes) -> bytes:
    return tag + struct.pack(">i", len(body) + 4) + body


_WARNING: Final = _message(
    b"N",
    b"SWARNING\0VWARNING\0C01000\0Mcanceling wait for synchronous replication due to user request\0"
    b"DThe transaction has already committed locally, but might not have been replicated to the"
    b" standby.\0\0",
)
"""As the server says it (``syncrep.c``)."""
