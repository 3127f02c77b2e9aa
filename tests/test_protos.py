"""The generated messages against etcd's wire contract.

`wire_contract.txt` holds the facts of the descriptors in etcd's published Go modules, version
3.7.3: every message and service that a client can reach, less what only etcd's members tell one
another. A number or type that differs would still encode, and be misread by every client.
"""

from collections.abc import Iterator
from pathlib import Path

from google.protobuf.descriptor import (
    Descriptor,
    EnumDescriptor,
    FieldDescriptor,
    FileDescriptor,
    MethodDescriptor,
)

from kvstore.pb import auth_pb2, election_pb2, health_pb2, kv_pb2, lock_pb2, rpc_pb2

CONTRACT = Path(__file__).with_name("wire_contract.txt")
FILES = (auth_pb2, election_pb2, health_pb2, kv_pb2, lock_pb2, rpc_pb2)
SCALARS = {
    FieldDescriptor.TYPE_BOOL: "bool",
    FieldDescriptor.TYPE_BYTES: "bytes",
    FieldDescriptor.TYPE_INT32: "int32",
    FieldDescriptor.TYPE_INT64: "int64",
    FieldDescriptor.TYPE_STRING: "string",
    FieldDescriptor.TYPE_UINT32: "uint32",
    FieldDescriptor.TYPE_UINT64: "uint64",
}


def field_fact(field: FieldDescriptor) -> str:
    """Return name, number and type of a field."""
    kind = field.message_type or field.enum_type
    text = kind.full_name if kind else SCALARS[field.type]
    if field.is_repeated:
        text = f"repeated {text}"
    if field.containing_oneof:
        text = f"{text} in {field.containing_oneof.name}"
    return f"{field.name}={field.number} {text}"


def enum_fact(enum: EnumDescriptor) -> str:
    """Return the names and numbers of an enum."""
    values = ", ".join(f"{value.name}={value.number}" for value in enum.values)
    return f"enum {enum.full_name}: {values}"


def method_fact(method: MethodDescriptor) -> str:
    """Return what a method takes and gives."""
    request, answer = method.input_type.full_name, method.output_type.full_name
    if method.client_streaming:
        request = f"stream {request}"
    if method.server_streaming:
        answer = f"stream {answer}"
    return f"rpc {method.containing_service.full_name}/{method.name}: {request} -> {answer}"


def message_facts(message: Descriptor) -> Iterator[str]:
    """Yield the fields of a message, its enums and the messages declared in it."""
    fields = ", ".join(field_fact(field) for field in message.fields)
    yield f"message {message.full_name}: {fields}".rstrip()
    yield from map(enum_fact, message.enum_types)
    for nested in message.nested_types:
        yield from message_facts(nested)


def file_facts(file: FileDescriptor) -> Iterator[str]:
    """Yield everything that a file declares."""
    yield from map(enum_fact, file.enum_types_by_name.values())
    for message in file.message_types_by_name.values():
        yield from message_facts(message)
    for service in file.services_by_name.values():
        yield from map(method_fact, service.methods)


def test_every_message_and_method_is_etcds() -> None:
    """Messages, enums and services are exactly those that etcd declares, number by number."""
    ours = sorted(fact for module in FILES for fact in file_facts(module.DESCRIPTOR))
    assert CONTRACT.read_text().splitlines() == ours


def test_names_on_the_wire_carry_no_folder_of_ours() -> None:
    """The packages are etcd's, although the files lie in `kvstore/pb`."""
    packages = {module.DESCRIPTOR.package for module in FILES}
    etcds = {"authpb", "etcdserverpb", "grpc.health.v1", "mvccpb", "v3electionpb", "v3lockpb"}
    assert etcds == packages
