"""etcdserverpb.Cluster: the one member, as etcd shows it."""

from kvstore.kv import Header
from kvstore.pb import rpc_pb2 as pb
from kvstore.rpc.cluster import ClusterService
from tests.stack import serve


def test_member_list_shows_one_member_and_no_revision() -> None:
    """The header has ids and term but revision 0, as in etcd; the member is the header's."""
    header = Header(cluster_id=1 << 63, member_id=(1 << 64) - 1, raft_term=3)
    urls = ["http://a:2379", "http://b:2379"]
    service = ClusterService(header, name="one", client_urls=urls, peer_urls=["http://a:2380"])
    (method,) = service.methods()
    assert method.path == b"/etcdserverpb.Cluster/MemberList"
    for request in (pb.MemberListRequest(), pb.MemberListRequest(linearizable=True)):
        body = serve(service.member_list, request.SerializeToString()).body
        assert body is not None
        assert pb.MemberListResponse.FromString(body) == pb.MemberListResponse(
            header=pb.ResponseHeader(cluster_id=1 << 63, member_id=(1 << 64) - 1, raft_term=3),
            members=[
                pb.Member(ID=(1 << 64) - 1, name="one", peerURLs=["http://a:2380"], clientURLs=urls)
            ],
        )
