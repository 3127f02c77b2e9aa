"""Every RPC of etcd's API: its path, its shape and its messages, from the protocol itself."""

from typing import NamedTuple

from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from kvstore.pb import rpc_pb2 as pb
from kvstore.transport.api import Kind


class Rpc(NamedTuple):
    """One RPC."""

    path: bytes
    kind: Kind
    request: type[Message]
    answer: type[Message]

    @property
    def name(self) -> bytes:
        """``KV/Range``."""
        return self.path.rpartition(b".")[2]


def _kind(*, client_streaming: bool, server_streaming: bool) -> Kind:
    if client_streaming:
        return Kind.BIDI_STREAM
    return Kind.SERVER_STREAM if server_streaming else Kind.UNARY


RPCS = {
    rpc.path: rpc
    for rpc in (
        Rpc(
            f"/{service.full_name}/{method.name}".encode(),
            _kind(
                client_streaming=method.client_streaming, server_streaming=method.server_streaming
            ),
            GetMessageClass(method.input_type),
            GetMessageClass(method.output_type),
        )
        for service in pb.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    )
}
"""By path."""
