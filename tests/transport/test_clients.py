"""Clients written by others: grpcio and h2."""

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import replace

import grpc
import h2.connection
import h2.events
import pytest

from tests.transport.limits import TEST_LIMITS
from tests.transport.peer import PATIENCE, message, messages, request_fields
from tests.transport.running import eventually, serving
from tests.transport.service import PATH

Metadata = tuple[tuple[str, str | bytes], ...]
RAW = {"request_serializer": bytes, "response_deserializer": bytes}


async def test_grpcio_unary() -> None:
    """Grpcio's answers, statuses, metadata and large messages."""
    async with serving() as running:
        channel = grpc.insecure_channel(
            f"127.0.0.1:{running.port}", options=[("grpc.max_receive_message_length", -1)]
        )

        def work() -> None:
            def call(name: str, body: bytes, metadata: Metadata = ()) -> bytes:
                method = channel.unary_unary(PATH + name, **RAW)
                answer: bytes = method(body, timeout=PATIENCE, metadata=metadata)
                return answer

            assert call("Echo", b"hello") == b"hello"
            assert call("Later", b"x" * 1_500_000) == b"x" * 1_500_000
            assert len(call("Size", b"20000000")) == 20_000_000
            assert call("Metadata", b"a-bin", metadata=(("a-bin", b"\0\1"),)) == b"\0\1"
            with pytest.raises(grpc.RpcError) as failed:
                call("Fail", "raise naïve %".encode())
            assert (failed.value.code(), failed.value.details()) == (
                grpc.StatusCode.NOT_FOUND,
                "naïve %",
            )
            with pytest.raises(grpc.RpcError) as unknown:
                call("Nothing", b"")
            assert unknown.value.code() is grpc.StatusCode.UNIMPLEMENTED

        with channel:
            await asyncio.to_thread(work)


async def test_grpcio_streams() -> None:
    """Grpcio's streams, both ways, with half-close and cancellation."""
    async with serving() as running:
        channel = grpc.insecure_channel(f"127.0.0.1:{running.port}")
        go_on = threading.Event()

        def work() -> None:
            count = channel.unary_stream(PATH + "Count", **RAW)(b"1000 1000", timeout=PATIENCE)
            assert [len(body) for body in count] == [1000 + len(str(i)) for i in range(1000)]
            sent = [b"%d" % i * 1000 for i in range(20)]
            chat = channel.stream_stream(PATH + "Chat", **RAW)
            assert list(chat(iter(sent), timeout=PATIENCE)) == sent

            def wait() -> Iterator[bytes]:
                yield b"one"
                go_on.wait(PATIENCE)

            tap = channel.stream_stream(PATH + "Tap", **RAW)(wait(), timeout=PATIENCE)
            go_on.wait(PATIENCE)
            tap.cancel()

        with channel:
            working = asyncio.create_task(asyncio.to_thread(work))
            await eventually(lambda: bool(running.service.taps))
            sink = running.service.taps[0]
            await eventually(lambda: sink.events == [b"one"])
            go_on.set()
            await working
            await eventually(lambda: sink.events[-1] == "closed")


async def test_grpcio_deadline() -> None:
    """A client's deadline cancels the call here, too."""
    async with serving() as running:
        channel = grpc.insecure_channel(f"127.0.0.1:{running.port}")

        def work() -> None:
            with pytest.raises(grpc.RpcError) as failed:
                channel.unary_unary(PATH + "Never", **RAW)(b"", timeout=0.05)
            assert failed.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED

        with channel:
            await asyncio.to_thread(work)
            await eventually(lambda: running.service.cancelled == 1)


@pytest.mark.parametrize("window", [100, 65_535, 1 << 20])
async def test_h2(window: int) -> None:
    """The h2 library, which checks every frame and window of ours, is content."""
    limits = replace(TEST_LIMITS, stream_window_bytes=30_000)
    async with serving(limits) as running:
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        connection = h2.connection.H2Connection()
        connection.initiate_connection()
        connection.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window})
        bodies = {sid: b"%d" % sid * (sid * 3000) for sid in range(1, 20, 2)}
        unsent = {}
        for sid, body in bodies.items():
            fields = request_fields(PATH + ("Echo" if sid % 4 == 1 else "Chat"))
            connection.send_headers(sid, fields)
            unsent[sid] = message(body)
        got = dict.fromkeys(bodies, b"")
        statuses: dict[int, bytes] = {}
        while len(statuses) < len(bodies):
            _send_what_fits(connection, unsent)
            writer.write(connection.data_to_send())
            async with asyncio.timeout(PATIENCE):
                events = connection.receive_data(await reader.read(65_536))
            for event in events:
                if isinstance(event, h2.events.DataReceived):
                    got[event.stream_id] += event.data
                    connection.acknowledge_received_data(
                        event.flow_controlled_length, event.stream_id
                    )
                elif isinstance(event, h2.events.TrailersReceived):
                    statuses[event.stream_id] = dict(event.headers)[b"grpc-status"]
        assert set(statuses.values()) == {b"0"}
        assert {sid: messages(data) for sid, data in got.items()} == {
            sid: [body] for sid, body in bodies.items()
        }
        writer.close()
        await writer.wait_closed()


def _send_what_fits(connection: h2.connection.H2Connection, unsent: dict[int, bytes]) -> None:
    """Send as much of every request as the windows allow."""
    for sid in list(unsent):
        room = min(connection.local_flow_control_window(sid), 16_384)
        while room > 0 and sid in unsent:
            part, unsent[sid] = unsent[sid][:room], unsent[sid][room:]
            connection.send_data(sid, part, end_stream=not unsent[sid])
            if not unsent[sid]:
                del unsent[sid]
            else:
                room = min(connection.local_flow_control_window(sid), 16_384)
