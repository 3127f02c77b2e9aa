"""Replace what a trace must not tell by as many bytes that tell nothing.

Replaced are the values of objects, wherever they stand: put, compared with, read, watched, before
(``prev_kv``). The same value always becomes the same synthetic one, so that what was equal stays
equal and digests still match; the secret from which it is made ends with the recording, so nobody
can try values out. Of a snapshot every byte is replaced by a zero, of Auth's calls every password
and token.

**Not** replaced are keys (``/registry/secrets/prod/payment-token`` names a namespace and a secret),
sizes, times, revisions, leases, addresses and names of members, users and roles, and the texts of
errors. Bytes of fields that the protocol does not know are left out.
"""

from hashlib import blake2b

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

from bench.replay.trace import TraceError
from bench.values import value

_LONG = 256
"""From here on a value is JSON, as an object's is; shorter ones are hexadecimal digits."""
_VALUES = frozenset(
    ("mvccpb.KeyValue.value", "etcdserverpb.PutRequest.value", "etcdserverpb.Compare.value")
)
_BLOB = "etcdserverpb.SnapshotResponse.blob"
_SECRETS = ("password", "hashedPassword", "token")
_CACHE_MAX = 1024
_CACHED_BYTES_MAX = 4096


class Scrubber:
    """Replaces the secrets of messages; ``secret`` is the recording's own."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._cache: dict[bytes, bytes] = {}

    def message(self, kind: type[Message], raw: bytes) -> bytes:
        """A message of that type, with the values in it replaced."""
        message = kind()
        try:
            message.ParseFromString(raw)
        except DecodeError as error:
            raise TraceError(f"a {kind.__name__} cannot be scrubbed: {error}") from error
        message.DiscardUnknownFields()
        self._walk(message)
        return message.SerializeToString()

    def _walk(self, message: Message) -> None:
        for field, content in message.ListFields():
            if field.type == FieldDescriptor.TYPE_MESSAGE:
                for part in content if field.is_repeated else (content,):
                    self._walk(part)
            elif field.full_name in _VALUES:
                setattr(message, field.name, self.value(content))
            elif field.full_name == _BLOB:
                setattr(message, field.name, bytes(len(content)))
            elif field.name in _SECRETS:
                setattr(message, field.name, "x" * len(content))

    def value(self, raw: bytes) -> bytes:
        """What stands for a value: of its size, and always the same."""
        known = self._cache.get(raw)
        if known is None:
            known = self._synthetic(raw)
            if len(raw) <= _CACHED_BYTES_MAX:
                if len(self._cache) >= _CACHE_MAX:
                    self._cache.clear()
                self._cache[raw] = known
        return known

    def _synthetic(self, raw: bytes) -> bytes:
        mark = blake2b(raw, key=self._secret, digest_size=16).hexdigest()
        size = len(raw)
        if size < _LONG:
            return (mark.encode() * (size // len(mark) + 1))[:size]
        made = value(run=mark, actor=0, seq=0, shape="pod", size=size)
        assert len(made) == size
        return made
