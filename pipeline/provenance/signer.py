"""The signer of Content Credentials: a certificate, and its key from a file or a callback."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pipeline.config import ProvenanceSettings, SignerSettings
from pipeline.errors import UserError

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

INSTALL = "pip install 'fixative[c2pa]'"


def provenance_fields(settings: ProvenanceSettings) -> dict[str, Any]:
    """What decides the provenance of stored images, for the fingerprint: the rights, and who signs.

    The signer is named as the certificate's subject, not by the files or the certificate's digest: when it is renewed,
    an archive goes on in the same destination and with the same pixels. Each row names the certificate by its serial.

    Raises:
        UserError: The certificate cannot be read or used.
    """
    fields = settings.model_dump(exclude={"signer"})
    if settings.signer.certificate is None:
        return {**fields, "signer": None}
    certificate = _leaf(settings.signer.certificate)
    return {**fields, "signer": {"subject": certificate.subject.rfc4514_string(), "algorithm": _algorithm(certificate)}}


def offline_settings(settings: SignerSettings | None = None, trust_anchors: str = "") -> dict[str, Any]:
    """How c2pa is set up: no thumbnail, no request but to the time-stamp authority that the operator names.

    Args:
        settings: The signer; None to read only.
        trust_anchors: PEM certificates that readers trust; "" for none.
    """
    authority = urlsplit(settings.timestamp_url or "").hostname if settings else None
    trust = {"trust": {"user_anchors": trust_anchors}} if trust_anchors else {}
    return {
        "builder": {"thumbnail": {"enabled": False}},
        "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False, "verify_after_sign": True},
        "core": {"allowed_network_hosts": [authority] if authority else []},
        **trust,
    }


@cache
def open_signer(settings: SignerSettings) -> tuple[Any, Any]:
    """The c2pa signer and the context of a process; made once.

    Raises:
        UserError: c2pa is missing, a file cannot be read, or key and certificate do not fit together.
    """
    c2pa = c2pa_library()
    path = Path(settings.certificate or "")
    algorithm = _algorithm(_leaf(str(path)))
    chain = path.read_bytes()
    try:
        context = c2pa.Context.from_dict(offline_settings(settings))
        if settings.callback is not None:
            kind, call = c2pa.C2paSigningAlg[algorithm.upper()], _callback(settings.callback)
            return c2pa.Signer.from_callback(call, kind, chain.decode(), settings.timestamp_url), context
        key = _read(str(settings.key))
        found = c2pa.Signer.from_info(c2pa.C2paSignerInfo(algorithm, chain, key, settings.timestamp_url))
    except (c2pa.C2paError, ValueError) as error:
        raise UserError(f"the signer with certificate {path} cannot be used: {error}") from error
    return found, context


def read_authorities(path: Path) -> str:
    """The PEM certificates of a file.

    Raises:
        UserError: It holds none.
    """
    _leaf(str(path))
    return path.read_text()


def c2pa_library() -> Any:
    """The optional package.

    Raises:
        UserError: It is not installed.
    """
    try:
        import c2pa
    except ImportError as error:
        raise UserError(f"Content Credentials need c2pa-python: {INSTALL}") from error
    return c2pa


def _leaf(path: str) -> Certificate:
    """The signer's own certificate: the first of the file."""
    c2pa_library()  # brings cryptography
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificates(_read(path))[0]
    except ValueError as error:
        raise UserError(f"{path} holds no PEM certificate (of a chain, the signer's own stands first)") from error


def _algorithm(certificate: Certificate) -> str:
    """The C2PA name of the algorithm that fits the certificate's key."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    key = certificate.public_key()
    if isinstance(key, ed25519.Ed25519PublicKey):
        return "ed25519"
    if isinstance(key, rsa.RSAPublicKey):
        return "ps256"
    curves = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in curves:
        return curves[key.curve.name]
    raise UserError("C2PA signs with P-256, P-384, P-521, RSA or Ed25519 keys; this certificate has another one")


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read on this machine: {error.strerror}") from error


def _callback(name: str) -> Callable[[bytes], bytes]:
    module, _, function = name.partition(":")
    try:
        found: Callable[[bytes], bytes] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UserError(f"the signer's callback {name} cannot be loaded: {error}") from error
    return found
