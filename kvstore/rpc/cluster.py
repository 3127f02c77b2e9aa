"""etcdserverpb.Cluster: MemberList. There is one member, and it stays that one."""

from collections.abc import Sequence

from kvstore.kv import Header
from kvstore.pb import rpc_pb2 as pb
from kvstore.rpc import decode
from kvstore.transport.api import Call, Method

_SERVICE = b"/etcdserverpb.Cluster/"


class ClusterService:
    """The handlers of etcdserverpb.Cluster.

    ``client_urls`` are those that clients are told to connect to; ``peer_urls`` may be empty, for
    there are no peers.
    """

    def __init__(
        self,
        header: Header,
        *,
        name: str,
        client_urls: Sequence[str],
        peer_urls: Sequence[str] = (),
    ) -> None:
        member = pb.Member(
            ID=header.member_id, name=name, peerURLs=peer_urls, clientURLs=client_urls
        )
        members = pb.MemberListResponse(members=[member])
        self._answer = header.at(0) + members.SerializeToString()

    def methods(self) -> list[Method]:
        """The service's table for the transport."""
        return [Method.unary(_SERVICE + b"MemberList", self.member_list)]

    def member_list(self, payload: bytes, _call: Call) -> bytes:
        """Cluster.MemberList; its header has no revision, as etcd's."""
        decode.parse(pb.MemberListRequest.FromString, payload)
        return self._answer
