"""gRPC calls as a client sees them: answers, statuses, metadata, deadlines, cancellation."""

import base64
from collections import Counter
from dataclasses import replace

import pytest
from hyperframe.frame import DataFrame, Frame, RstStreamFrame

from tests.transport.limits import TEST_LIMITS
from tests.transport.peer import PATIENCE, Fields, Peer, connected, message, request_fields
from tests.transport.running import eventually, serving
from tests.transport.service import PATH


def send(peer: Peer, fields: Fields, *data: bytes, end: bool = True) -> int:
    """A request of these header fields and DATA frames."""
    sid = peer.next_sid
    peer.next_sid += 2
    frames: list[Frame] = [peer.headers(sid, fields, *(["END_STREAM"] if end and not data else []))]
    for i, part in enumerate(data):
        last = end and i == len(data) - 1
        frames.append(DataFrame(sid, part, flags=["END_STREAM"] if last else []))
    peer.send(*frames)
    return sid


async def test_unary_answer() -> None:
    """An answer has headers, one message and trailers with status 0."""
    async with serving() as running, connected(running.port) as peer:
        for body in (b"", b"x", b"hello" * 100):
            answer = await peer.call(PATH + "Echo", body)
            assert answer.headers == {":status": "200", "content-type": "application/grpc"}
            assert (answer.messages, answer.status, answer.reset) == ([body], (0, ""), None)


async def test_pending_answer() -> None:
    """A handler may answer later, also after other calls of the connection."""
    async with serving() as running, connected(running.port) as peer:
        sids = [peer.start(PATH + name, name.encode()) for name in ("Later", "Echo", "Later")]
        answers = {sid: peer.answer(sid) for sid in sids}
        assert [(await answers[sid]).messages for sid in (sids[1], sids[0], sids[2])] == [
            [b"Echo"],
            [b"Later"],
            [b"Later"],
        ]


async def test_calls_of_one_read_share_a_write() -> None:
    """Many calls in one segment are all answered, in order."""
    async with serving() as running, connected(running.port) as peer:
        first = peer.start(PATH + "Echo", b"warm")
        assert (await peer.answer(first)).messages == [b"warm"]
        sids = [peer.start(PATH + "Echo", b"%d" % i, grpc_timeout="5S") for i in range(50)]
        assert [(await peer.answer(sid)).messages for sid in sids] == [
            [b"%d" % i] for i in range(50)
        ]


@pytest.mark.parametrize(
    ("request_message", "status"),
    [
        (b"raise not here", (5, "not here")),
        (b"fail no good", (9, "no good")),
        ("fail 100 % naïve \n".encode(), (9, "100 %25 na%C3%AFve %0A")),
        (b"raise ", (5, "")),
    ],
)
async def test_status(request_message: bytes, status: tuple[int, str]) -> None:
    """A refused call ends with its code and its text, percent-encoded, in one header block."""
    async with serving() as running, connected(running.port) as peer:
        answer = await peer.call(PATH + "Fail", request_message)
        assert (answer.messages, answer.trailers, answer.status) == ([], {}, status)


async def test_handler_that_fails() -> None:
    """An unexpected exception is told to the operator, and to the client without its text."""
    async with serving(expect_failures=True) as running, connected(running.port) as peer:
        assert (await peer.call(PATH + "Fail", b"crash secret")).status == (13, "internal error")
        assert running.failures == ["handler failed: ZeroDivisionError('secret')"]
        assert (await peer.call(PATH + "Echo", b"alive")).messages == [b"alive"]


async def test_only_the_first_answer_counts() -> None:
    """A call is answered once, whatever its handler does."""
    async with serving() as running, connected(running.port) as peer:
        assert (await peer.call(PATH + "Twice")).messages == [b"first"]
        assert (await peer.call(PATH + "Echo", b"next")).messages == [b"next"]


@pytest.mark.parametrize(("count", "size"), [(0, 0), (1, 0), (3, 5), (500, 1100), (3, 100_000)])
async def test_answer_in_parts(count: int, size: int) -> None:
    """An answer given as parts is their concatenation."""
    async with serving() as running, connected(running.port) as peer:
        answer = await peer.call(PATH + "Parts", b"%d %d" % (count, size))
        assert answer.messages == [b"".join(b"%c" % (i % 256) * size for i in range(count))]
        assert answer.status == (0, "")
        assert running.server.stats().calls == 0


@pytest.mark.parametrize("where", ["data_received", "flush", "tick"])
async def test_a_bug_costs_one_connection(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of ours closes the connection where it happened, is told, and harms no other."""
    async with serving(expect_failures=True) as running, connected(running.port) as peer:
        await peer.call(PATH + "Echo", b"x")
        connection = running.connection

        def fail(*_: object) -> None:
            raise ZeroDivisionError

        if where == "data_received":
            monkeypatch.setattr(type(connection.streams), "granted", fail)
        elif where == "tick":
            monkeypatch.setattr(type(connection.streams), "expire", fail)
        else:
            monkeypatch.setattr(type(connection.output), "_hand_over", fail)
        sid = peer.start(PATH + "Later", b"x")
        peer.grant(sid, 1000)
        await peer.read_all()
        monkeypatch.undo()
        assert "ZeroDivisionError()" in running.failures[0]
        async with connected(running.port) as other:
            assert (await other.call(PATH + "Echo", b"x")).messages == [b"x"]


NOT_GRPC = "invalid gRPC request content-type "


@pytest.mark.parametrize(
    ("change", "http_status", "status"),
    [
        ({":path": "/a.B/C"}, "200", (12, "unknown service a.B")),
        ({":path": PATH + "No"}, "200", (12, "unknown method No for service test.Service")),
        ({":path": PATH[1:] + "Echo"}, "200", (12, 'malformed method name: "test.Service/Echo"')),
        ({":path": "/Echo"}, "200", (12, 'malformed method name: "/Echo"')),
        ({":method": "GET"}, "405", (13, 'Received a HEADERS frame with :method "GET" which')),
        ({"content-type": "text/html"}, "415", (3, NOT_GRPC + '"text/html"')),
        ({"content-type": "application/grpcx"}, "415", (3, NOT_GRPC + '"application/grpcx"')),
        ({"grpc-timeout": "1x"}, "400", (13, "malformed grpc-timeout: transport: timeout unit")),
        ({"grpc-timeout": "S"}, "400", (13, "malformed grpc-timeout: transport: timeout string")),
        ({"grpc-timeout": "123456789S"}, "400", (13, "malformed grpc-timeout: transport: timeout")),
        ({"grpc-timeout": "-1S"}, "400", (13, "malformed grpc-timeout: strconv.ParseUint: parsin")),
        ({"grpc-timeout": "0n"}, "200", (4, "context deadline exceeded")),
        ({"a-bin": "!"}, "400", (13, 'malformed binary metadata "!" in header "a-bin": illegal b')),
        ({"grpc-encoding": "gzip"}, "200", (12, "grpc: Decompressor is not installed for grpc-en")),
        ({"host": "a,b"}, "400", (13, "num values of :authority: 1, num values of host: 2, both ")),
    ],
)
async def test_refused_by_headers(
    change: dict[str, str], http_status: str, status: tuple[int, str]
) -> None:
    """Requests that cannot be served are answered as grpc-go answers them."""
    fields = [*{**dict(request_fields(PATH + "Echo")), **change}.items()]
    async with serving() as running, connected(running.port) as peer:
        answer = await peer.answer(send(peer, fields, message(b"x")))
        assert (answer.headers[":status"], answer.status[0]) == (http_status, status[0])
        assert answer.status[1].startswith(status[1])
        assert (await peer.call(PATH + "Echo", b"next")).messages == [b"next"]


@pytest.mark.parametrize(
    "content_type", ["application/grpc", "application/grpc+proto", "application/grpc;charset=utf-8"]
)
async def test_content_types(content_type: str) -> None:
    """Every content type of gRPC is served."""
    fields = [
        (n, content_type if n == "content-type" else v) for n, v in request_fields(PATH + "Echo")
    ]
    async with serving() as running, connected(running.port) as peer:
        answer = await peer.answer(send(peer, fields, message(b"x")))
        assert answer.messages == [b"x"]


@pytest.mark.parametrize(
    ("data", "status"),
    [
        ([], (2, "EOF")),
        ([b""], (2, "EOF")),
        ([message(b"abc")[:3]], (2, "EOF")),
        ([message(b"abc")[:6]], (2, "unexpected EOF")),
        ([message(b"abc", compressed=1)], (13, "grpc: compressed flag set with identity or empty")),
        ([message(b"abc", compressed=7)], (13, "grpc: received unexpected payload format 7")),
        ([b"\0\x10\0\0\0"], (8, "grpc: received message larger than max (268435456 vs. 2097152)")),
    ],
)
async def test_refused_by_message(data: list[bytes], status: tuple[int, str]) -> None:
    """Requests without a proper message are answered as grpc-go answers them."""
    async with serving() as running, connected(running.port) as peer:
        answer = await peer.answer(send(peer, request_fields(PATH + "Echo"), *data))
        assert (answer.messages, answer.status[0]) == ([], status[0])
        assert answer.status[1].startswith(status[1])


async def test_second_message_is_ignored() -> None:
    """A unary call with two messages is served with the first, as by grpc-go."""
    async with serving() as running, connected(running.port) as peer:
        fields = request_fields(PATH + "Echo")
        both = await peer.answer(send(peer, fields, message(b"one") + message(b"two")))
        apart = await peer.answer(send(peer, fields, message(b"one"), message(b"two")))
        assert both.messages == apart.messages == [b"one"]


@pytest.mark.parametrize("cuts", [[1], [5], [4, 1], [5, 3], [1] * 9, [0, 6, 0]])
async def test_message_in_pieces(cuts: list[int]) -> None:
    """A message may be cut into DATA frames anywhere, padded ones among them."""
    whole = message(b"abcdefgh")
    parts = []
    for cut in cuts:
        parts.append(whole[:cut])
        whole = whole[cut:]
    async with serving() as running, connected(running.port) as peer:
        sid = send(peer, request_fields(PATH + "Echo"), *parts, end=False)
        last = DataFrame(sid, whole, flags=["PADDED", "END_STREAM"], pad_length=7)
        peer.send(last)
        assert (await peer.answer(sid)).messages == [b"abcdefgh"]


async def test_largest_message() -> None:
    """A request of exactly the limit is served, and one byte more is refused by its prefix."""
    limits = replace(TEST_LIMITS, message_bytes_max=100_000)
    async with serving(limits) as running, connected(running.port) as peer:
        body = bytes(100_000)
        data = message(body)
        parts = [data[i : i + 16_384] for i in range(0, len(data), 16_384)]
        answer = await peer.answer(send(peer, request_fields(PATH + "Echo"), *parts))
        assert answer.messages == [body]
        sid = send(peer, request_fields(PATH + "Echo"), message(bytes(100_001))[:5], end=False)
        assert (await peer.answer(sid)).status[0] == 8
        reset = await peer.until(lambda f: isinstance(f, RstStreamFrame))
        assert isinstance(reset, RstStreamFrame)
        assert (reset.stream_id, reset.error_code) == (sid, 0)


async def test_metadata() -> None:
    """Headers are read by name; repeated ones are joined, binary ones decoded."""
    fields = [
        *request_fields(PATH + "Metadata", token="abc", hasleader="true"),
        ("twice", "a"),
        ("twice", "b"),
        ("raw-bin", base64.b64encode(b"\0\1").decode().rstrip("=")),
    ]
    expected = {
        b"token": b"abc",
        b"hasleader": b"true",
        b"twice": b"a,b",
        b"raw-bin": b"\0\1",
        b":authority": b"localhost",
        b"missing": b"",
    }
    async with serving() as running, connected(running.port) as peer:
        for name, value in expected.items():
            answer = await peer.answer(send(peer, fields, message(name)))
            assert answer.messages == [value], name


async def test_deadline_reaches_the_handler() -> None:
    """``grpc-timeout`` is a point on the server's clock; without one there is none."""
    async with serving() as running, connected(running.port) as peer:
        for _ in range(3):  # the first is decoded, the others match its template
            now = running.server.clock()
            answer = await peer.call(PATH + "Deadline", grpc_timeout="100S")
            assert 99 < float(answer.messages[0]) - now < 101
        assert (await peer.call(PATH + "Deadline")).messages == [b"None"]


async def test_deadline_ends_a_call() -> None:
    """A call past its deadline is answered DeadlineExceeded and its handler is told."""
    async with serving() as running, connected(running.port) as peer:
        sid = peer.start(PATH + "Never", b"", grpc_timeout="10m")
        assert (await peer.answer(sid)).status == (4, "context deadline exceeded")
        assert (running.service.cancelled, running.service.parked) == (1, [])
        assert running.server.stats().calls == 0


async def test_reset_cancels_a_call() -> None:
    """RST_STREAM by the client tells the handler, and a late answer is dropped."""
    async with serving() as running, connected(running.port) as peer:
        sid = peer.start(PATH + "Never", b"")
        await eventually(lambda: bool(running.service.parked))
        (call,) = running.service.parked
        peer.send(RstStreamFrame(sid, 8))
        await eventually(lambda: running.service.cancelled == 1)
        assert call.cancelled
        call.reply(b"late")
        call.fail(5, "late")
        assert (await peer.call(PATH + "Echo", b"next")).messages == [b"next"]
        assert not [f for f in peer.seen if f.stream_id == sid]


async def test_lost_connection_cancels_calls() -> None:
    """Calls of a lost connection are cancelled, each handler is told once."""
    async with serving() as running:
        async with connected(running.port) as peer:
            for _ in range(10):
                peer.start(PATH + "Never", b"")
            await eventually(lambda: len(running.service.parked) == 10)
        await eventually(lambda: running.service.cancelled == 10)
        assert running.server.stats().calls == 0


async def test_every_call_that_ends_has_started() -> None:
    """Whatever becomes of a call, its method counts it once as started and once as ended."""
    ended: list[bytes] = []
    echo = request_fields(PATH + "Echo")
    async with serving(observer=lambda path, _code, _seconds: ended.append(path)) as running:
        async with connected(running.port) as peer:
            await peer.call(PATH + "Count", b"2 10")
            for name in ("Echo", "Echo", "Later", "Fail", "Closed", "Nothing"):
                await peer.call(PATH + name, b"raise x")
            await peer.answer(send(peer, [*echo, ("grpc-timeout", "1x")]))
            await peer.answer(send(peer, echo))
            await peer.answer(send(peer, echo, b"\0\x10\0\0\0"))
            await peer.answer(send(peer, [*echo, ("content-length", "5")], message(b"")[:4]))
            await peer.answer(send(peer, request_fields(PATH + "Count")))
            cancelled = [send(peer, request_fields(PATH + n), end=False) for n in ("Echo", "Chat")]
            peer.send(*(RstStreamFrame(sid, 8) for sid in cancelled))
            peer.start(PATH + "Echo")
            await peer.settle()
        await eventually(lambda: running.server.stats().connections == 0)
        started = {route.path: route.started for route in running.server.method_stats()}
    assert Counter(filter(None, ended)) == {path: count for path, count in started.items() if count}


async def test_observer_is_told_of_every_end() -> None:
    """Answered, refused and cancelled calls are reported with path, code and time taken."""
    seen: list[tuple[bytes, int]] = []

    def observe(path: bytes, code: int, seconds: float) -> None:
        assert 0 <= seconds < PATIENCE
        seen.append((path, code))

    async with serving(observer=observe) as running:
        async with connected(running.port) as peer:
            await peer.call(PATH + "Echo")
            await peer.call(PATH + "Later")
            await peer.call(PATH + "Fail", b"raise x")
            await peer.call("/a.B/C")
            await peer.call(PATH + "Count", b"2 10")
            peer.start(PATH + "Never", b"")
            await eventually(lambda: bool(running.service.parked))
        await eventually(lambda: len(seen) == 6)
    root = PATH.encode()
    assert seen == [
        (root + b"Echo", 0),
        (root + b"Later", 0),
        (root + b"Fail", 5),
        (b"", 12),
        (root + b"Count", 0),
        (root + b"Never", 1),
    ]
