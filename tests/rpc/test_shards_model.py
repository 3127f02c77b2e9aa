"""Three shards answer as one would: whatever is asked, one request after the other, and after a
restart.
"""

from typing import Any

import pytest
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.memory import MemoryDisk
from kvstore.pb import rpc_pb2 as pb
from tests.model import Model, RefusalError
from tests.stack import Stack, serve
from tests.test_model import (
    EDGE,
    LEASES,
    delete_requests,
    normalise,
    put_requests,
    range_requests,
    txn_requests,
    update_requests,
)

ROUTES = {b"a/": 1, b"b": 2}
ALL = pb.RangeRequest(key=b"\0", range_end=b"\0")
requests = st.one_of(
    put_requests(), delete_requests(), txn_requests(), update_requests(), range_requests()
)


class Three:
    """The stores, and the model of what they hold."""

    def __init__(self) -> None:
        self.disks = [MemoryDisk(shard=str(number)) for number in range(3)]
        self.model = Model(leases=set(LEASES))
        self.start()

    def start(self) -> None:
        """A process over the disks."""
        self.engine = Stack(self.disks, routes=ROUTES, leases=set(LEASES))

    def forget(self) -> None:
        """Values leave memory."""
        index = self.engine.store.index
        for chunk in index._chunks:
            chunk.hot = False
        index.evict(0, self.engine.commits.durable)

    def ask(self, request: Message) -> None:
        """Send a request, and compare its answer."""
        kv, model = self.engine.kv, self.model
        ways: dict[type[Message], tuple[Any, Any, Any]] = {
            pb.PutRequest: (kv.put, model.put, pb.PutResponse),
            pb.DeleteRangeRequest: (kv.delete_range, model.delete_range, pb.DeleteRangeResponse),
            pb.TxnRequest: (kv.txn, model.txn, pb.TxnResponse),
            pb.RangeRequest: (kv.range, model.range, pb.RangeResponse),
        }
        method, modelled, answer = ways[type(request)]
        call = serve(method, request.SerializeToString())
        self.engine.settle()
        model.durable = self.engine.commits.durable
        if call.failed and call.failed[1] in EDGE:
            return  # by its shape alone
        try:
            expected = modelled(request)
        except RefusalError as refusal:
            assert call.failed is not None, "refused"
            assert call.failed[1] == str(refusal)
            return
        model.durable = self.engine.commits.durable
        assert call.body is not None, call.failed
        actual = answer.FromString(call.body)
        for each in (actual, expected):
            normalise(each, sort=True)
        assert actual == expected


@pytest.mark.slow
@given(st.lists(st.tuples(requests, st.booleans()), max_size=20))
@settings(deadline=None)
def test_three_shards_answer_as_one(sent: list[tuple[Message, bool]]) -> None:
    """Headers and counts included; nothing is left of the records then."""
    three = Three()
    for request, forget in sent:
        if forget:
            three.forget()
        three.ask(request)
    assert three.disks[0].redo == []
    three.ask(ALL)
    three.engine.crash()
    three.start()
    three.ask(ALL)
