"""Three shards of a real server, killed while it writes over all of them: each is sound, whatever
was under way.
"""

import random
import signal
import threading
from pathlib import Path

import grpc
import pytest

from kvstore.pb import rpc_pb2 as pb
from tests import program

CYCLES = 2
WRITERS = 6
ANSWERS = 100
"""Requests that are answered before the server is killed."""
PREFIXES = [b"/core/", b"/events/", b"/agents/"]
CONFIG = """\
shards:
  - {name: core, backend: "sqlite:core.db"}
  - {name: events, backend: "sqlite:events.db"}
  - {name: agents, backend: "sqlite:agents.db"}
routes:
  - {prefix: /events/, shard: events}
  - {prefix: /agents/, shard: agents}
"""


def operation(key: bytes, *, delete: bool) -> pb.RequestOp:
    """A put or a delete of ``key``."""
    if delete:
        return pb.RequestOp(request_delete_range=pb.DeleteRangeRequest(key=key))
    return pb.RequestOp(request_put=pb.PutRequest(key=key, value=key * 20))


def work(address: str, dice: random.Random, answered: threading.Semaphore) -> None:
    """Change keys of one to three shards at a time, and compact now and then, until the server is
    gone.
    """
    with grpc.insecure_channel(address) as channel:
        txn = channel.unary_unary(
            "/etcdserverpb.KV/Txn",
            request_serializer=pb.TxnRequest.SerializeToString,
            response_deserializer=pb.TxnResponse.FromString,
        )
        compact = channel.unary_unary(
            "/etcdserverpb.KV/Compact",
            request_serializer=pb.CompactionRequest.SerializeToString,
            response_deserializer=pb.CompactionResponse.FromString,
        )
        while True:
            keys = {dice.choice(PREFIXES) + b"%d" % dice.randrange(20) for _ in range(4)}
            chosen = sorted(keys)[: dice.randrange(1, 5)]
            ops = [operation(key, delete=dice.random() < 0.2) for key in chosen]
            try:
                answer = txn(pb.TxnRequest(success=ops), timeout=program.PATIENCE)
                if dice.random() < 0.05:
                    revision = answer.header.revision - 20
                    compact(pb.CompactionRequest(revision=revision), timeout=program.PATIENCE)
            except grpc.RpcError as error:
                if error.code() is grpc.StatusCode.UNAVAILABLE:
                    return
            answered.release()


@pytest.mark.slow
def test_shards_of_a_killed_server_are_sound(tmp_path: Path) -> None:
    """After each kill -9, a check finds every shard sound, redo rows that are left included, and
    the next server goes on from there.
    """
    dice = random.Random(5)
    config = tmp_path / "shards.yaml"
    config.write_text(CONFIG)
    flags = ("--config", str(config))
    for _ in range(CYCLES):
        answered = threading.Semaphore(0)
        with program.serving(tmp_path / "data", *flags) as server:
            address = program.url(server)
            writers = [
                threading.Thread(
                    target=work, args=(address, random.Random(dice.random()), answered)
                )
                for _ in range(WRITERS)
            ]
            for writer in writers:
                writer.start()
            for _ in range(ANSWERS + dice.randrange(50)):
                assert answered.acquire(timeout=program.PATIENCE)
            server.process.send_signal(signal.SIGKILL)
            for writer in writers:
                writer.join(program.PATIENCE)
        code, told, error = program.run("check", "--data-dir", str(tmp_path / "data"), *flags)
        assert (0, "") == (code, error), told
        assert 3 == told.count("findings 0")
