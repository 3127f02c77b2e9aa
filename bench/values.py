"""Values that look like what Kubernetes stores: JSON, compressible, of measured sizes.

Random bytes would switch off the compression of whatever stands below a server, without a word.
Each value begins with who wrote it, ``{"run":"..","actor":12,"seq":3,"owner":""``, so that it names
its origin wherever it turns up; the rest repeats what objects of its shape are made of.
A value is a function of its arguments: it need not be stored to be known.
"""

import re
import zlib

SHAPES = {
    "claim": '"kind":"SandboxClaim","apiVersion":"extensions.agents.x-k8s.io/v1beta1"',
    "sandbox": '"kind":"Sandbox","apiVersion":"agents.x-k8s.io/v1beta1"',
    "pool": '"kind":"SandboxWarmPool","apiVersion":"extensions.agents.x-k8s.io/v1beta1"',
    "pod": '"kind":"Pod","apiVersion":"v1"',
    "event": '"kind":"Event","apiVersion":"v1"',
    "lease": '"kind":"Lease","apiVersion":"coordination.k8s.io/v1"',
    "node": '"kind":"Node","apiVersion":"v1"',
    "run": '"kind":"PipelineRun","apiVersion":"tekton.dev/v1"',
    "configmap": '"kind":"ConfigMap","apiVersion":"v1"',
    "endpoints": '"kind":"Endpoints","apiVersion":"v1"',
}
"""What each kind of object calls itself."""

_FIELDS = (
    "managedFields:[{{manager:agent-controller,operation:Update,time:2026-01-02T03:04:{:02d}Z,"
    "fieldsType:FieldsV1,fieldsV1:{{f:status:{{f:conditions:{{k:{{type:Ready}}:{{.:{{}},"
    "f:lastTransitionTime:{{}},f:reason:{{}},f:status:{{}}}}}}}}}}}}],"
    "conditions:[{{type:Ready,status:True,reason:Condition{},observedGeneration:{}}}],"
    "containers:[{{name:tool-{},image:images.example/agents/python:{}.{},env:[{{STEP:{}}}]}}],"
)
"""Fields of an object; a value has them inside one string, so that any length of them is JSON."""
_TAIL = b'"}'
_COUNT = re.compile(rb'"count":"(\d{10})"')
_ENTRIES_END = b"]}"


def _filler() -> bytes:
    """64 KiB of fields that differ a little."""
    pieces = (_FIELDS.format(n % 60, n, n * 7, n, n % 13, n % 7, n * n) for n in range(250))
    return "".join(pieces).encode()


_FILLER = _filler()


def value(*, run: str, actor: int, seq: int, shape: str, size: int, owner: str = "") -> bytes:
    """A value of ``size`` bytes, or of as many as its head needs."""
    head = b'{"run":"%b","actor":%d,"seq":%d,"owner":"%b","count":"0000000000",' % (
        run.encode(),
        actor,
        seq,
        owner.encode(),
    )
    return head + _body(shape, size - len(head))


def _body(shape: str, size: int) -> bytes:
    kind = SHAPES[shape].encode()
    room = max(0, size - len(kind) - 11)
    text = (_FILLER * (room // len(_FILLER) + 1))[:room] if room > len(_FILLER) else _FILLER[:room]
    return b'%b,"text":"%b"}' % (kind, text)


def is_owned(raw: bytes) -> bool:
    """Does the object say that it has an owner?"""
    return b'"owner":""' not in raw[:128]


def count_of(raw: bytes) -> int:
    """The counter that ``increment`` raises."""
    found = _COUNT.search(raw)
    return int(found[1]) if found else 0


def increment(raw: bytes, *, run: str, actor: int, seq: int) -> bytes:
    """The same object with its counter raised by one, written by ``actor``."""
    count = count_of(raw) + 1
    rest = raw[raw.index(b'"count":') + 20 :]
    owner = raw[raw.index(b'"owner":"') + 9 : raw.index(b'","count"')]
    return b'{"run":"%b","actor":%d,"seq":%d,"owner":"%b","count":"%010d"%b' % (
        run.encode(),
        actor,
        seq,
        owner,
        count,
        rest,
    )


def append(raw: bytes, entry: str, size: int) -> bytes:
    """The same object with one more entry of about ``size`` bytes in its list of steps."""
    marker = b'","steps":['
    item = b'{"name":"%b","text":"%b"}' % (entry.encode(), b"s" * max(0, size - len(entry) - 22))
    if marker in raw:
        return raw[: -len(_ENTRIES_END)] + b"," + item + _ENTRIES_END
    return raw[: -len(_TAIL)] + marker + item + _ENTRIES_END


def entries(raw: bytes) -> list[str]:
    """The names of the steps in an object's list, in order."""
    at = raw.find(b'","steps":[')
    return (
        [name.decode() for name in re.findall(rb'\{"name":"([^"]*)"', raw[at:])] if at >= 0 else []
    )


def digest(raw: bytes) -> int:
    """What a value is known by in the records: CRC-32, with its length above."""
    return zlib.crc32(raw) | len(raw) << 32
