"""A replayed stream of watches, message by message."""

import json
from itertools import count
from pathlib import Path

from bench.records import MESSAGES, WATCHES, Recorder, Records
from bench.replay.watching import WatchStream
from kvstore.pb import rpc_pb2 as pb
from kvstore.transport import grpc
from tests.bench.judges.world import facts_of


async def test_what_is_no_answer_ends_the_stream(tmp_path: Path) -> None:
    """A message that cannot be read is the server's error, and what follows is of no watch."""
    watches, messages = Recorder(WATCHES), Recorder(MESSAGES)
    stream = WatchStream(
        0, 0, count(), {"watches": watches, "messages": messages}, lambda _, __: None
    )
    stream.create(pb.WatchCreateRequest(key=b"a"))
    created = pb.WatchResponse(created=True, watch_id=3).SerializeToString()
    for message in (created, b"\x0f", created):
        stream.message(message, 1)
    assert stream.over
    assert (1, 1) == (len(messages), len(watches))
    watches.write(tmp_path, 0)
    (tmp_path / "run.json").write_text(json.dumps(facts_of()))
    assert [grpc.INTERNAL] == Records(tmp_path).frame(WATCHES)["code"].tolist()
