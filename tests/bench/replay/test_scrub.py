"""A scrubbed trace keeps sizes and keys, and tells no value."""

from pathlib import Path

import pytest

from bench.replay.scrub import Scrubber
from bench.replay.trace import Trace
from kvstore.pb import kv_pb2
from kvstore.pb import rpc_pb2 as pb
from tests.bench.replay.stand import (
    WATCH,
    client,
    create,
    recording,
    update,
    watch_from,
)

KEY = b"/registry/secrets/ns/token"
SECRETS = (b"hunter2-hunter2", b"swordfish-" * 400, b"x" * 256)


def scrubbed(message: pb.TxnRequest) -> pb.TxnRequest:
    """A Txn without its secrets."""
    scrubber = Scrubber(b"secret")
    return pb.TxnRequest.FromString(scrubber.message(pb.TxnRequest, message.SerializeToString()))


@pytest.mark.parametrize("size", [0, 1, 7, 255, 256, 257, 5_000, 200_000])
def test_size_stays(size: int) -> None:
    """What stands for a value has its size, however small or large."""
    assert len(Scrubber(b"secret").value(b"v" * size)) == size


def test_equal_values_stay_equal() -> None:
    """The same value becomes the same, another becomes another; not so in another recording."""
    one = Scrubber(b"secret")
    assert one.value(b"first value") == one.value(b"first value")
    assert one.value(b"first value") != one.value(b"other value")
    assert Scrubber(b"other secret").value(b"first value") != one.value(b"first value")


def test_values_are_replaced_however_deep() -> None:
    """Puts in both branches and in Txns inside, and what is compared with."""
    put = pb.RequestOp(request_put=pb.PutRequest(key=b"k", value=b"secret!"))
    inner = pb.RequestOp(request_txn=pb.TxnRequest(failure=[put]))
    compare = pb.Compare(target=pb.Compare.VALUE, key=b"k", value=b"secret!")
    got = scrubbed(pb.TxnRequest(compare=[compare], success=[put, inner], failure=[put]))
    assert b"secret!" not in got.SerializeToString()
    value = got.compare[0].value
    assert value == got.success[0].request_put.value
    assert value == got.success[1].request_txn.failure[0].request_put.value
    assert got.failure[0].request_put.key == b"k"


def test_unknown_fields_are_left_out() -> None:
    """A field that the protocol does not know may hold anything."""
    raw = pb.PutRequest(key=b"k").SerializeToString() + b"\xf2\x3f\x06hidden"
    assert b"hidden" not in Scrubber(b"s").message(pb.PutRequest, raw)


def test_snapshot_and_passwords() -> None:
    """A snapshot is zeros; passwords and tokens are crossed out."""
    scrubber = Scrubber(b"secret")
    snapshot = pb.SnapshotResponse(remaining_bytes=5, blob=b"everything").SerializeToString()
    got = pb.SnapshotResponse.FromString(scrubber.message(pb.SnapshotResponse, snapshot))
    assert (got.remaining_bytes, got.blob) == (5, bytes(10))
    login = pb.AuthenticateRequest(name="root", password="hunter2").SerializeToString()
    assert b"hunter2" not in scrubber.message(pb.AuthenticateRequest, login)


@pytest.mark.slow
async def test_recording_hides_values_and_the_client_gets_them(tmp_path: Path) -> None:
    """No value is in a scrubbed file: put, read, watched, before, or there beforehand."""
    out = tmp_path / "trace"
    async with (
        recording(
            out, scrub=True, before=lambda direct: direct.txn(create(KEY, SECRETS[0]))
        ) as stand,
        client(stand.port) as user,
    ):
        stream = user.stream(WATCH)
        await stream.write(watch_from(b"/registry/"))
        await stream.read()
        for n, secret in enumerate(SECRETS):
            await user.txn(update(KEY, secret, n + 2))
            (event,) = pb.WatchResponse.FromString(await stream.read()).events
            assert event.kv.value == secret
        await user.txn(update(KEY, SECRETS[0], 2))
        assert (await user.range(pb.RangeRequest(key=KEY))).kvs[0].value == SECRETS[2]
    everything = b"".join(row.message for row in Trace(out))
    assert not [secret for secret in SECRETS if secret in everything]
    assert KEY in everything
    put = pb.TxnRequest.FromString(stand.calls("Txn")[1].message).success[0].request_put.value
    assert len(put) == len(SECRETS[1])
    downs = [pb.WatchResponse.FromString(row.message) for row in stand.rows if row.kind == 4]
    events: list[kv_pb2.Event] = [event for down in downs for event in down.events]
    assert events[1].kv.value == put
    assert events[2].prev_kv.value == put
