"""etcdserverpb.Cluster: the one member, as etcd shows it."""

import pytest

from kvstore.kv import Header
from kvstore.pb import rpc_pb2 as pb
from kvstore.rpc.cluster import ClusterService
from tests.stack import serve

URLS = ["http://a:2379", "http://b:2379"]
MEMBER_ID = (1 << 64) - 1
NOT_FOUND = (5, "etcdserver: member not found")
INVALID = (3, "etcdserver: given member URLs are invalid")


@pytest.fixture
def service() -> ClusterService:
    """A member with the largest ids there are."""
    header = Header(cluster_id=1 << 63, member_id=MEMBER_ID, raft_term=3)
    return ClusterService(header, name="one", client_urls=URLS, peer_urls=["http://a:2380"])


def test_member_list_shows_one_member_and_no_revision(service: ClusterService) -> None:
    """The header has ids and term but revision 0, as in etcd; the member is the header's."""
    member = pb.Member(ID=MEMBER_ID, name="one", peerURLs=["http://a:2380"], clientURLs=URLS)
    for request in (pb.MemberListRequest(), pb.MemberListRequest(linearizable=True)):
        body = serve(service.member_list, request.SerializeToString()).body
        assert body is not None
        assert pb.MemberListResponse.FromString(body) == pb.MemberListResponse(
            header=pb.ResponseHeader(cluster_id=1 << 63, member_id=MEMBER_ID, raft_term=3),
            members=[member],
        )


@pytest.mark.parametrize(
    ("member_id", "failed"),
    [
        (4711, [NOT_FOUND] * 3),
        (
            MEMBER_ID,
            [
                (2, "etcdserver: re-configuration failed due to not enough started members"),
                (12, "etcdserver: members cannot be updated"),
                (9, "etcdserver: can only promote a learner member"),
            ],
        ),
    ],
)
def test_the_member_stays_as_it_is(
    service: ClusterService, member_id: int, failed: list[tuple[int, str]]
) -> None:
    """Other members are not found; this one cannot be removed, updated or promoted."""
    found = [
        serve(service.member_remove, pb.MemberRemoveRequest(ID=member_id).SerializeToString()),
        serve(service.member_update, pb.MemberUpdateRequest(ID=member_id).SerializeToString()),
        serve(service.member_promote, pb.MemberPromoteRequest(ID=member_id).SerializeToString()),
    ]
    assert [call.failed for call in found] == failed


@pytest.mark.parametrize(
    ("urls", "valid"),
    [
        ([], False),
        (["http://a"], False),
        (["http://a:1/x"], False),
        (["ftp://a:1"], False),
        (["http://a:x"], False),
        (["http://a b:1"], False),
        (["::"], False),
        (["http://a:1", "a"], False),
        (["http://a:1"], True),
        (["https://[::1]:1"], True),
        (["http://a:1?x"], True),
        ([" http://:1 "], True),
        (["unix://x"], True),
        (["unixs:x"], True),
    ],
)
def test_members_are_not_added(service: ClusterService, urls: list[str], *, valid: bool) -> None:
    """URLs that etcd finds invalid are refused with its words, others as not served."""
    request = pb.MemberAddRequest(peerURLs=urls)
    failed = serve(service.member_add, request.SerializeToString()).failed
    assert failed == ((12, "etcdserver: members cannot be added") if valid else INVALID)
