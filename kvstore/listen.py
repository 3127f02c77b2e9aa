"""Listen URLs as users of etcd write them, and the sockets bound to them.

``http://127.0.0.1:2379``, ``https://[::1]:2379``, ``unix:///run/kvstore.sock``; several are
separated by commas. As in etcd (``client/pkg/types/urls.go``, ``server/embed/config.go``) a URL to
listen on names an IP address or ``localhost``, a port, and nothing else.

Sockets are bound here and listened on later: a port in use is found before any data is touched, and
clients are refused, not kept waiting, until the store can answer.
"""

import errno
import socket
import stat
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit


class ListenError(Exception):
    """A URL that cannot be listened on; the message is one line for the user."""


class Address(NamedTuple):
    """One listen URL, taken apart."""

    url: str
    tls: bool
    host: str
    """Empty with a path."""
    port: int
    path: str
    """Of a UNIX socket; empty otherwise."""


def parse_urls(text: str) -> list[Address]:
    """The addresses of comma-separated URLs; raises ``ListenError``."""
    addresses = [_parse(part.strip()) for part in text.split(",")]
    seen: set[str] = set()
    for address in addresses:
        if address.url in seen:
            raise ListenError(f"listen URL given twice: {address.url}")
        seen.add(address.url)
    return addresses


def check_advertised(urls: Sequence[str]) -> None:
    """Raise ``ListenError`` unless ``urls`` can be told to clients: hosts may have names."""
    for url in urls:
        _take_apart(url)


def _parse(url: str) -> Address:
    address = _take_apart(url)
    if not address.path and address.host != "localhost" and not _is_ip(address.host):
        raise ListenError(f"expected IP in URL for binding ({url})")
    return address


def _take_apart(url: str) -> Address:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ListenError(f"bad URL {url!r}: {error}") from error
    if parts.scheme == "unix":
        path = parts.netloc + parts.path
        if not path:
            raise ListenError(f"a unix URL needs a path: {url}")
        return Address(url=url, tls=False, host="", port=0, path=path)
    if parts.scheme not in {"http", "https"}:
        raise ListenError(f"URL scheme must be http, https or unix: {url}")
    if port is None:
        raise ListenError(f'URL address does not have the form "host:port": {url}')
    if parts.path or parts.query or parts.fragment:
        raise ListenError(f"URL must not contain a path: {url}")
    host = parts.hostname or ""
    return Address(url=url, tls=parts.scheme == "https", host=host, port=port, path="")


def _is_ip(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def bind(address: Address) -> socket.socket:
    """A non-blocking socket bound to ``address``, not yet listening; raises ``ListenError``."""
    try:
        return _bind_path(address.path) if address.path else _bind_port(address)
    except OSError as error:
        raise cannot_listen(address.url, error) from error


def cannot_listen(url: str, error: OSError) -> ListenError:
    """What to raise; a taken address is spelled alike, whether it shows at bind or at listen."""
    taken = error.errno == errno.EADDRINUSE
    reason = "address already in use" if taken else error.strerror or error
    return ListenError(f"cannot listen on {url}: {reason}")


def address_of(bound: socket.socket, address: Address) -> str:
    """The URL that is really listened on: with the port that the system chose for port 0."""
    if address.path:
        return address.url
    scheme = "https" if address.tls else "http"
    host = f"[{address.host}]" if ":" in address.host else address.host
    return f"{scheme}://{host}:{bound.getsockname()[1]}"


def _bind_port(address: Address) -> socket.socket:
    host = "127.0.0.1" if address.host == "localhost" else address.host
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setblocking(False)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, address.port))
    except BaseException:
        bound.close()
        raise
    return bound


def _bind_path(path: str) -> socket.socket:
    """Like etcd, takes over a socket file that nobody listens on any more."""
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        bound.setblocking(False)
        if _is_abandoned(path):
            Path(path).unlink()
        bound.bind(path)
    except BaseException:
        bound.close()
        raise
    return bound


def _is_abandoned(path: str) -> bool:
    try:
        if not stat.S_ISSOCK(Path(path).stat().st_mode):
            return False
    except FileNotFoundError:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(path) == errno.ECONNREFUSED
