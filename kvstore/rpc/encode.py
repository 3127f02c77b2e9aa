"""From the engine's results to encoded KV answers, by joining ready bytes.

Field numbers are those of ``protos/rpc.proto``; every function is compared with the protobuf
library by a test. ``framed`` is a KeyValue as field 2 (see ``kv``). Headers come framed as field 1.
"""

from collections.abc import Callable, Sequence

from kvstore.history import Entry
from kvstore.kv import as_field_3, frame, frame_key_value, revision_header, varint
from kvstore.range import Item, RangeRead
from kvstore.txn import DeleteResult, PutResult, RangeResult, Result, TxnResult

Lookup = Callable[[Item], bytes]
"""The framed KeyValue of an item whose value had to be fetched."""


def range_response(header: bytes, read: RangeRead) -> bytes:
    """A RangeResponse; every value that is shown is there."""
    return b"".join(range_parts(header, read))


def range_parts(header: bytes, read: RangeRead) -> list[bytes]:
    """Likewise, in parts that it shares with the cache."""
    return [header, *shown_pairs(read), range_totals(read)]


def range_totals(read: RangeRead) -> bytes:
    """The fields ``more`` and ``count`` of a RangeResponse."""
    more = b"\x18\x01" if read.more else b""
    return more + b"\x20" + varint(read.count) if read.count else more


def shown_pairs(read: RangeRead, start: int = 0, *, leases: bool = True) -> list[bytes]:
    """The framed KeyValues of an answer from place ``start``: whole, or without their values for
    ``keys_only`` (etcd 3.7 leaves out their ``leases`` too).
    """
    if read.query.keys_only:
        pairs = zip(read.keys[start:], read.entries[start:], strict=True)
        return [key_only(key, entry, leases=leases) for key, entry in pairs]
    return [value for value in read.values[start:] if value is not None]


def key_only(key: bytes, entry: Entry, *, leases: bool) -> bytes:
    """A framed KeyValue without its value."""
    mod, _, create, version, lease = entry
    return frame_key_value(key, create, mod, version, b"", lease if leases else 0)


def put_response(header: bytes, result: PutResult, lookup: Lookup) -> bytes:
    """A PutResponse."""
    return header if result.previous is None else header + lookup(result.previous)


def delete_response(header: bytes, result: DeleteResult, lookup: Lookup) -> bytes:
    """A DeleteRangeResponse."""
    if not result.deleted:
        return header
    previous = [as_field_3(lookup(item)) for item in result.previous]
    return b"".join((header, b"\x10", varint(result.deleted), *previous))


def txn_response(header: bytes, result: TxnResult, lookup: Lookup) -> bytes:
    """A TxnResponse."""
    succeeded = b"\x10\x01" if result.succeeded else b""
    operations = [frame(b"\x1a", _response_op(one, lookup)) for one in result.results]
    return b"".join((header, succeeded, *operations))


def put_succeeded(header: bytes, revision: int) -> bytes:
    """A TxnResponse that succeeded with one put at ``revision``."""
    number = varint(revision)
    size = len(number)
    return b"%b\x10\x01\x1a%c\x12%c\x0a%c\x18%b" % (header, size + 5, size + 3, size + 1, number)


def _response_op(result: Result, lookup: Lookup) -> bytes:
    match result:
        case PutResult():
            header = revision_header(result.revision)
            return frame(b"\x12", put_response(header, result, lookup))
        case RangeResult():
            return frame(b"\x0a", _range_in_txn(result, lookup))
        case DeleteResult():
            header = revision_header(result.revision)
            return frame(b"\x1a", delete_response(header, result, lookup))
        case TxnResult():
            return frame(b"\x22", txn_response(b"\x0a\x00", result, lookup))


def _range_in_txn(result: RangeResult, lookup: Lookup) -> bytes:
    read = result.read
    if not read.query.keys_only:
        read.values = [
            value if value is not None else lookup(Item(key, entry, None))
            for key, entry, value in zip(read.keys, read.entries, read.values, strict=True)
        ]
    return range_response(revision_header(result.revision), read)


def shown_items(results: Sequence[Result]) -> list[Item]:
    """Items whose values the answer shows and that are not in memory."""
    missing: list[Item] = []
    for result in results:
        match result:
            case PutResult():
                if result.previous is not None and result.previous.framed is None:
                    missing.append(result.previous)
            case DeleteResult():
                missing += [item for item in result.previous if item.framed is None]
            case RangeResult():
                read = result.read
                missing += [Item(read.keys[i], read.entries[i], None) for i in read.missing()]
            case TxnResult():
                missing += shown_items(result.results)
    return missing
