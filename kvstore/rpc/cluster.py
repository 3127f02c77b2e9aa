"""etcdserverpb.Cluster: there is one member, and it stays that one.

MemberList shows it. The other methods refuse: what etcd would refuse of a cluster of one, with
etcd's words, and what it would do, as UNIMPLEMENTED.
"""

import re
from collections.abc import Sequence
from typing import NoReturn

from kvstore import errors
from kvstore.kv import Header
from kvstore.pb import rpc_pb2 as pb
from kvstore.rpc import decode
from kvstore.transport.api import Call, Method, StatusError

_SERVICE = b"/etcdserverpb.Cluster/"

_PEER_URL = re.compile(
    r"\s*(https?://(\[[^]\s]*\]|[^][:/?#\s]*):\d*([?#].*)?|unixs?:.*)\s*", re.DOTALL
)
"""What etcd takes for a peer's URL: host and port without a path, or a socket."""


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
        self._member_id = header.member_id
        self._answer = header.at(0) + members.SerializeToString()

    def methods(self) -> list[Method]:
        """The service's table for the transport."""
        return [
            Method.unary(_SERVICE + b"MemberList", self.member_list),
            Method.unary(_SERVICE + b"MemberAdd", self.member_add),
            Method.unary(_SERVICE + b"MemberRemove", self.member_remove),
            Method.unary(_SERVICE + b"MemberUpdate", self.member_update),
            Method.unary(_SERVICE + b"MemberPromote", self.member_promote),
        ]

    def member_list(self, payload: bytes, _call: Call) -> bytes:
        """Cluster.MemberList; its header has no revision, as etcd's."""
        decode.parse(pb.MemberListRequest.FromString, payload)
        return self._answer

    def member_add(self, payload: bytes, _call: Call) -> NoReturn:
        """Cluster.MemberAdd."""
        urls = decode.parse(pb.MemberAddRequest.FromString, payload).peerURLs
        if not urls or not all(map(_PEER_URL.fullmatch, urls)):
            text = "etcdserver: given member URLs are invalid"
            raise StatusError(errors.INVALID_ARGUMENT, text)
        raise StatusError(errors.UNIMPLEMENTED, "etcdserver: members cannot be added")

    def member_remove(self, payload: bytes, _call: Call) -> NoReturn:
        """Cluster.MemberRemove."""
        self._check(decode.parse(pb.MemberRemoveRequest.FromString, payload).ID)
        # UNKNOWN is what etcd sends: its table names the client's error for this one.
        text = "etcdserver: re-configuration failed due to not enough started members"
        raise StatusError(errors.UNKNOWN, text)

    def member_update(self, payload: bytes, _call: Call) -> NoReturn:
        """Cluster.MemberUpdate."""
        self._check(decode.parse(pb.MemberUpdateRequest.FromString, payload).ID)
        raise StatusError(errors.UNIMPLEMENTED, "etcdserver: members cannot be updated")

    def member_promote(self, payload: bytes, _call: Call) -> NoReturn:
        """Cluster.MemberPromote."""
        self._check(decode.parse(pb.MemberPromoteRequest.FromString, payload).ID)
        text = "etcdserver: can only promote a learner member"
        raise StatusError(errors.FAILED_PRECONDITION, text)

    def _check(self, member_id: int) -> None:
        if member_id != self._member_id:
            raise StatusError(errors.NOT_FOUND, "etcdserver: member not found")
