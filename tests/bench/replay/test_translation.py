"""What was recorded is found again on another server."""

from hypothesis import given
from hypothesis import strategies as some

from bench.replay.script import Script, read_script
from bench.replay.trace import Kind, Row
from bench.replay.translation import REVISIONS, Translation
from kvstore.pb import kv_pb2
from kvstore.pb import rpc_pb2 as pb

BEGUN = 10
PAIRS = some.lists(
    some.tuples(some.integers(BEGUN, 60), some.integers(100, 160)), unique_by=lambda pair: pair[0]
)


def written(translation: Translation, recorded: int, replayed: int, key: bytes = b"k") -> None:
    """A put was answered, then and now."""
    then, now = pb.PutResponse(), pb.PutResponse()
    then.header.revision, now.header.revision = recorded, replayed
    translation.answered(7, pb.PutRequest(key=key), then, now)


@given(pairs=PAIRS, asked=some.integers(BEGUN, 70))
def test_revision_stands_for_the_writes_up_to_it(pairs: list[tuple[int, int]], asked: int) -> None:
    """It is the highest at which a write recorded so far was replayed, in whatever order."""
    translation = Translation(Script(), BEGUN, 1.0)
    translation.begin(99)
    for recorded, replayed in pairs:
        written(translation, recorded, replayed)
    due = max((now for then, now in pairs if then <= asked), default=99)
    assert translation.revision(0, asked) == due
    assert not translation.unmapped


def test_a_client_s_own_answer_comes_first() -> None:
    """On the connection that was told a revision it is the one that the same answer told now."""
    translation = Translation(Script(), BEGUN, 1.0)
    translation.begin(99)
    then, now = pb.RangeResponse(), pb.RangeResponse()
    then.header.revision, now.header.revision = 15, 105
    translation.answered(3, pb.RangeRequest(key=b"k"), then, now)
    assert (translation.revision(3, 15), translation.revision(4, 15)) == (105, 99)


def test_history_from_before_the_recording_is_counted() -> None:
    """It is not there: what asks for it begins with the replay."""
    translation = Translation(Script(), BEGUN, 1.0)
    translation.begin(99)
    assert translation.revision(0, BEGUN - 1) == 99
    assert translation.unmapped == {REVISIONS: 1}


def test_time_to_live_goes_with_the_speed() -> None:
    """A lease of a trace that is replayed faster ends sooner, after a second at least."""
    for ttl, speed, due in ((100, 50.0, 2), (100, 1000.0, 1), (100, 0.5, 200)):
        grant = pb.LeaseGrantRequest(TTL=ttl)
        Translation(Script(), BEGUN, speed).request(0, grant)
        assert grant.TTL == due


def test_versions_from_before_are_taken_off_until_a_delete() -> None:
    """An object that had four versions has one here; created anew it counts from one in both."""
    translation = Translation(Script(), BEGUN, 1.0)
    translation.object(kv_pb2.KeyValue(key=b"k", mod_revision=9, version=4), 50)

    def compared(version: int) -> int:
        compare = pb.Compare(target=pb.Compare.VERSION, key=b"k", version=version)
        txn = pb.TxnRequest(compare=[compare])
        translation.request(0, txn)
        return txn.compare[0].version

    assert compared(5) == 2
    gone = pb.DeleteRangeResponse(deleted=1)
    translation.answered(0, pb.DeleteRangeRequest(key=b"k"), gone, gone)
    assert compared(1) == 1


def test_comparison_that_failed_fails_again() -> None:
    """With a revision that nothing explains, who won compares with what is newest, who lost not."""
    translation = Translation(Script(), BEGUN, 1.0)
    written(translation, 20, 120)
    for lost, due in ((False, 120), (True, 119)):
        compare = pb.Compare(target=pb.Compare.MOD, key=b"k", mod_revision=33)
        txn = pb.TxnRequest(compare=[compare])
        translation.request(0, txn, lost=lost)
        assert txn.compare[0].mod_revision == due
    assert translation.unmapped.total() == 2


def test_a_replay_begins_with_the_first_call() -> None:
    """Nobody waits again for the first client, which came when it came; all else keeps its time."""
    found = pb.RangeResponse(kvs=[kv_pb2.KeyValue(key=b"k", mod_revision=2)])
    path = b"/etcdserverpb.KV/Range"
    script = read_script(
        [
            Row(0, Kind.OBJECTS, -1, -1, message=found.SerializeToString()),
            Row(9_000_000, Kind.BEGIN, 0, 0, path),
            Row(9_000_300, Kind.END, 0, 0),
            Row(9_500_000, Kind.BEGIN, 0, 1, path),
            Row(9_500_400, Kind.END, 0, 1),
        ]
    )
    assert [0, 500_000] == [act.at for act in script.acts[0]]
    assert 500_400 == script.duration_us
    assert [b"k"] == [kv.key for kv in script.objects]
