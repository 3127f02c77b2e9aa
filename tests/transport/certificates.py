"""Certificates for tests, made by the openssl program."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

DAYS = "2"


@dataclass(frozen=True)
class Authority:
    """A CA of our own, in a folder of its own."""

    folder: Path
    name: str

    @classmethod
    def make(cls, folder: Path, name: str) -> "Authority":
        """A new CA."""
        authority = cls(folder, name)
        _run(
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", DAYS, "-subj", f"/CN={name}"),
            *("-keyout", str(authority.key), "-out", str(authority.certificate)),
        )
        return authority

    @property
    def certificate(self) -> Path:
        """What trusts it."""
        return self.folder / f"{self.name}.pem"

    @property
    def key(self) -> Path:
        """What signs."""
        return self.folder / f"{self.name}.key"

    def issue(self, name: str) -> tuple[Path, Path]:
        """Certificate and key for ``name`` at localhost."""
        certificate, key = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        request, extra = self.folder / f"{name}.csr", self.folder / f"{name}.ext"
        extra.write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
        _run(
            *("openssl", "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
            *("-subj", f"/CN={name}", "-keyout", str(key), "-out", str(request)),
        )
        _run(
            *("openssl", "x509", "-req", "-in", str(request), "-days", DAYS),
            *("-CA", str(self.certificate), "-CAkey", str(self.key), "-CAcreateserial"),
            *("-extfile", str(extra), "-out", str(certificate)),
        )
        return certificate, key

    def revoke(self, certificate: Path) -> Path:
        """A list of revoked certificates with this one."""
        database, config = self.folder / "index.txt", self.folder / "ca.cnf"
        database.write_text("")
        config.write_text(
            f"[ca]\ndefault_ca=a\n[a]\ndatabase={database}\ndefault_md=sha256\ndefault_crl_days=2\n"
        )
        signer = ("-keyfile", str(self.key), "-cert", str(self.certificate))
        base = ("openssl", "ca", "-config", str(config), *signer)
        _run(*base, "-revoke", str(certificate))
        revocations = self.folder / "crl.pem"
        _run(*base, "-gencrl", "-out", str(revocations))
        return revocations


def lock(key: Path, locked: Path) -> None:
    """Write ``key`` to ``locked``, under a password."""
    password = ("-aes256", "-passout", "pass:x")
    _run("openssl", "ec", "-in", str(key), "-out", str(locked), *password)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
