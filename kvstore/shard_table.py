"""``kvstore shards``: asks a running server for ``/shards`` and draws what it says.

Endpoints are spelled as for etcdctl: ``http://HOST:PORT``, ``https://HOST:PORT`` or ``HOST:PORT``,
which is https if a certificate is given, else http. A URL that is listened on for metrics will do
as well.
"""

import json
import ssl
from collections.abc import Mapping, Sequence
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Final
from urllib.parse import urlsplit

TIMEOUT: Final = 10.0
"""Seconds for each step of asking one server."""
PAGE_BYTES_MAX: Final = 16 << 20

_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB")
_UNKNOWN: Final = "-"

Row = Mapping[str, object]
"""What is told of one shard or route."""
Told = Mapping[str, Sequence[Row]]
"""``shards`` and ``routes``."""


class AskError(Exception):
    """No server answered as it should; the message is one line for the user."""


def ask(endpoints: Sequence[str], *, cacert: str, cert: str, key: str) -> Told:
    """What the first of ``endpoints`` tells that answers. Raises ``AskError``."""
    trouble = "--endpoints is empty"
    for endpoint in endpoints:
        try:
            return _ask(endpoint, cacert, cert, key)
        except (OSError, HTTPException) as error:  # ssl.SSLError, too
            reason = str(getattr(error, "strerror", None) or error)
            trouble = f"{endpoint}: {' '.join(reason.split())}"
    raise AskError(trouble)


def draw(told: Told) -> str:
    """Two tables: the shards, then the routes by prefix."""
    shards = [
        (
            str(shard["name"]) + (" (home)" if shard["home"] else ""),
            _number(shard["keys"]),
            _size(shard["bytes"]),
            _size(shard["bytes_in_use"]),
            _number(shard["tip"]),
            _number(shard["frontier_lag"]),
            str(shard["state"]) + _why(shard),
        )
        for shard in told["shards"]
    ]
    routes = [
        (_printable(str(route["prefix"])), str(route["shard"]), _number(route["keys"]))
        for route in told["routes"]
    ]
    heads = ("SHARD", "KEYS", "BYTES", "IN USE", "TIP", "LAG", "STATE")
    drawn = _columns([heads, *shards], right={1, 2, 3, 4, 5})
    if routes:
        drawn += ["", *_columns([("PREFIX", "SHARD", "KEYS"), *routes], right={2})]
    return "\n".join(drawn)


def _ask(endpoint: str, cacert: str, cert: str, key: str) -> Told:
    """Raises ``AskError`` for an answer that is none, ``OSError`` and ``HTTPException``."""
    secured = bool(cacert or cert)
    url = endpoint if "://" in endpoint else f"http{'s' * secured}://{endpoint}"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise AskError(f"{endpoint} is not an endpoint such as http://127.0.0.1:2379") from error
    if parts.scheme not in {"http", "https"} or not host or parts.path.strip("/"):
        raise AskError(f"{endpoint} is not an endpoint such as http://127.0.0.1:2379")
    connection = HTTPConnection(host, port, timeout=TIMEOUT)
    if parts.scheme == "https":
        context = ssl.create_default_context(cafile=cacert or None)
        if cert:
            context.load_cert_chain(cert, key or None)
        connection = HTTPSConnection(host, port, timeout=TIMEOUT, context=context)
    try:
        connection.request("GET", "/shards")
        answer = connection.getresponse()
        body = answer.read(PAGE_BYTES_MAX)
    finally:
        connection.close()
    try:
        told = json.loads(body) if answer.status == 200 else None
    except ValueError:
        told = None
    if not isinstance(told, dict) or not {"shards", "routes"} <= told.keys():
        raise AskError(f"{endpoint} does not tell of shards (status {answer.status})")
    return told


def _columns(rows: Sequence[Sequence[str]], *, right: set[int]) -> list[str]:
    """Lines with columns of equal width; those in ``right`` end at the same place."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if n in right else cell.ljust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _why(shard: Row) -> str:
    trouble = _printable(str(shard["trouble"]).removeprefix(f"{shard['state']}: "))
    return f": {trouble}" if trouble else ""


def _number(number: object) -> str:
    return f"{number:,}" if isinstance(number, int) else _UNKNOWN


def _size(size: object) -> str:
    """Bytes in the largest unit of which there is one."""
    if not isinstance(size, int):
        return _UNKNOWN
    scaled, unit = float(size), 0
    while scaled >= 1024 and unit + 1 < len(_UNITS):
        scaled, unit = scaled / 1024, unit + 1
    return f"{scaled:.1f} {_UNITS[unit]}" if unit else f"{size} {_UNITS[0]}"


def _printable(text: str) -> str:
    """As it is, but for bytes that are no text and what a terminal would take for an order."""
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # where ``prefix_text`` puts such a byte
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
