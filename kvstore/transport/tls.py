"""TLS: contexts built from files, and built again when the files change.

etcd reads its certificates at every handshake; here each handshake looks at the files' times and
sizes, and a changed file gives a new context for this and later handshakes.
A set of files that cannot be read (half written, a key that does not fit) leaves the old context in
place: a server must not lose its TLS to a bad renewal. Every handshake tries again; the failure is
told once per change, and so is a set that is read.
A key under a password is refused: there is nobody to ask for it.

Sizes of work: a look is one ``stat`` per file, a few microseconds beside a handshake's millisecond.
"""

import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

_BOTH = ("h2", "http/1.1")
"""Offered by ALPN; grpc-go insists on ``h2``."""
_HTTP1 = ("http/1.1",)
"""Offered where nothing else is spoken: a client that offers ``h2`` too must not get it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """Where certificates are; PEM, as for etcd's flags of the same meaning."""

    certificate: Path
    key: Path
    client_ca: Path | None = None
    """Certificates that clients' certificates must descend from (``--trusted-ca-file``)."""
    client_revocations: Path | None = None
    """Revoked client certificates (``--client-crl-file``)."""
    require_client_certificate: bool = False
    """Refuse clients without one (``--client-cert-auth``); needs ``client_ca``."""

    def paths(self) -> list[Path]:
        """The files there are."""
        files = (self.certificate, self.key, self.client_ca, self.client_revocations)
        return [path for path in files if path is not None]


def build_context(files: TlsFiles, protocols: Sequence[str] = _BOTH) -> ssl.SSLContext:
    """A server's context, which offers ``protocols`` by ALPN.

    Raises ``OSError`` or ``ssl.SSLError`` for files that do not serve.
    """
    # OpenSSL does not say which file it cannot read, or in which it has found nothing.
    for path, held, mark in (
        (files.certificate, "certificate", b"CERTIFICATE-----"),
        (files.key, "private key", b"PRIVATE KEY-----"),
        (files.client_ca, "certificate", b"CERTIFICATE-----"),
        (files.client_revocations, "list of revoked certificates", b"X509 CRL-----"),
    ):
        if path is not None and mark not in path.read_bytes():
            raise _refused(f"{path} holds no {held}")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(list(protocols))
    context.load_cert_chain(files.certificate, files.key, password=_no_password)
    if files.client_ca is not None:
        context.load_verify_locations(files.client_ca)
        context.verify_mode = ssl.CERT_OPTIONAL
    if files.client_revocations is not None:
        context.load_verify_locations(files.client_revocations)
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    if files.require_client_certificate:
        if files.client_ca is None:
            raise _refused("client certificates are required, but no CA to check them is given")
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _refused(reason: str) -> ssl.SSLError:
    """An error that says ``reason`` as those of OpenSSL do."""
    error = ssl.SSLError(ssl.SSL_ERROR_SSL, reason)
    error.reason = reason
    return error


def _no_password() -> NoReturn:
    """OpenSSL would ask on the terminal, and wait."""
    raise _refused("keys under a password are not supported")


def _build(files: TlsFiles) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Contexts that offer both protocols, and HTTP/1.1 alone."""
    return build_context(files, _BOTH), build_context(files, _HTTP1)


_Look = tuple[tuple[int, int, int], ...]


def _glance(path: Path) -> tuple[int, int, int]:
    """Of a file that cannot be looked at: the reason's number."""
    try:
        stat = path.stat()
    except OSError as error:
        return error.errno or 0, 0, 0
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def describe(files: TlsFiles, error: OSError) -> str:
    """Why no context can be built of ``files``, in one line."""
    if isinstance(error, ssl.SSLError):
        names = " ".join(str(path) for path in files.paths())
        return f"unusable certificates or keys in {names}: {error.reason or error}"
    return f"cannot read {error.filename or 'certificates'}: {error.strerror or error}"


class Tls:
    """The current contexts of one set of files."""

    def __init__(self, files: TlsFiles, on_change: Callable[[str | None], None]) -> None:
        """``on_change`` is told of files that changed: None, or why the old ones stay in use.

        Raises ``OSError`` or ``ssl.SSLError`` when the first context cannot be built.
        """
        self._files = files
        self._on_change = on_change
        self._seen = self._look()
        self._told: _Look | None = None
        """The files of which a failure was told."""
        self._both, self._http1 = _build(files)

    def _look(self) -> _Look:
        """What tells a changed file from an unchanged one."""
        return tuple(_glance(path) for path in self._files.paths())

    def context(self, *, http1_only: bool) -> ssl.SSLContext:
        """The context for the next handshake, which offers HTTP/2 as well or not."""
        seen = self._look()
        if seen != self._seen:
            try:
                self._both, self._http1 = _build(self._files)
                self._seen = seen
                self._told = None
                self._on_change(None)
            except (OSError, ssl.SSLError) as error:  # SSLError is an OSError; for the reader
                if seen != self._told:
                    self._told = seen
                    self._on_change(describe(self._files, error))
        return self._http1 if http1_only else self._both
