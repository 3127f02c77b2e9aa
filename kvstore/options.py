"""What one server is and where it listens: the flags that bound nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from kvstore.listen import Address


class TransportKind(StrEnum):
    """``--transport``."""

    NATIVE = "native"
    """The server's own HTTP/2."""
    GRPCIO = "grpcio"
    """The same handlers through grpcio, several times slower: a reference to compare with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsOptions:
    """Files of TLS, in PEM; read again when they change."""

    cert_file: Path
    key_file: Path
    trusted_ca_file: Path | None
    """Who may sign clients' certificates; without one, clients need no certificate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """Everything that ``kvstore serve`` was told besides bounds and logs."""

    name: str
    data_dir: Path
    listen_client_urls: Sequence[Address]
    advertise_client_urls: Sequence[str]
    """What clients are told in ``MemberList``; empty: where it listens."""
    listen_metrics_urls: Sequence[Address]
    tls: TlsOptions | None
    """None when no listen URL is https."""
    transport: TransportKind
    accept_data_loss: bool = False
    """Serve databases that have lost what was acknowledged, or are not the ones of before."""
