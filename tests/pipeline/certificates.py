"""A certificate authority and a signer, made on the spot."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID


@dataclass(frozen=True)
class Files:
    """PEM files: the chain, its key, and the authority that vouches for it."""

    certificate: Path
    key: Path
    authority: Path

    @property
    def settings(self) -> dict[str, Any]:
        return {"certificate": str(self.certificate), "key": str(self.key)}


def make_signer(folder: Path, name: str = "Signer", *, days: int = 30, kind: str = "ec") -> Files:
    """A fresh authority, and a signer of this common name whose certificate ends in so many days."""
    folder.mkdir(parents=True, exist_ok=True)
    authority_key = ec.generate_private_key(ec.SECP256R1())
    key = ed25519.Ed25519PrivateKey.generate() if kind == "ed25519" else ec.generate_private_key(ec.SECP256R1())
    root = _builder("Authority", "Authority", authority_key, 30)
    root = root.add_extension(x509.BasicConstraints(True, None), True).add_extension(_usage(authority=True), True)
    authority = root.sign(authority_key, hashes.SHA256())
    leaf = (
        _builder(name, "Authority", key, days)
        .add_extension(x509.BasicConstraints(False, None), True)
        .add_extension(_usage(authority=False), True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), False)
        .sign(authority_key, hashes.SHA256())
    )
    files = Files(folder / "chain.pem", folder / "key.pem", folder / "authority.pem")
    files.certificate.write_bytes(_pem(leaf) + _pem(authority))
    files.authority.write_bytes(_pem(authority))
    files.key.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return files


def _builder(subject: str, issuer: str, key: Any, days: int) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(_name(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=60))
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
    )


def _usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(True, False, False, False, False, authority, authority, False, False)


def _name(common: str) -> x509.Name:
    pairs = [(NameOID.ORGANIZATION_NAME, "Test Archive"), (NameOID.COMMON_NAME, common)]
    return x509.Name([x509.NameAttribute(oid, value) for oid, value in pairs])


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
