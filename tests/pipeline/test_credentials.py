"""Content Credentials: signed last, offline, without a picture; read back with the standard's own reader."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import c2pa
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from PIL import Image

from pipeline.config import ProvenanceSettings, SignerSettings
from pipeline.errors import EncodeError, FatalWorkerError, IntegrityError, UserError
from pipeline.image_metadata import ImageMetadata
from pipeline.provenance import signer as signer_module
from pipeline.provenance.credentials import Edit, check_signer, read_credentials, sign
from pipeline.provenance.rights import with_rights
from pipeline.provenance.signer import offline_settings, provenance_fields, read_authorities
from tests.pipeline import images
from tests.pipeline.certificates import Files, make_signer

XMP = with_rights(ImageMetadata(), ProvenanceSettings()).xmp
CALLBACK_KEY: list[Any] = []


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return make_signer(tmp_path_factory.mktemp("signer"))


def settings(files: Files, **changes: Any) -> SignerSettings:
    return SignerSettings.model_validate({**files.settings, **changes})


def edit(mime: str = "image/png") -> Edit:
    return Edit(
        title="gull.png",
        mime=mime,
        source_title="gull.jpg",
        source_mime="image/jpeg",
        source_sha256="ab" * 32,
        software={"name": "fixative", "version": "1"},
        parameters={"protector": "photoguard", "preset": "fast", "eps_levels": 4.0},
        xmp=XMP,
    )


def read(data: bytes, mime: str, authority: Path) -> tuple[str | None, dict[str, Any]]:
    """State and active manifest, as c2pa's reader gives them to anybody who trusts the authority."""
    context = c2pa.Context.from_dict({"trust": {"user_anchors": authority.read_text()}})
    with c2pa.Reader(mime, io.BytesIO(data), context=context) as reader:
        return reader.get_validation_state(), json.loads(reader.json())


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_signed_file(format: str, files: Files) -> None:
    mime, plain = f"image/{format.lower()}", images.plain(format)
    signed, found = sign(plain, edit(mime), settings(files))
    state, document = read(signed, mime, files.authority)
    assert state == "Trusted"
    (manifest,) = document["manifests"].values()
    said = {item["label"]: item["data"] for item in manifest["assertions"]}
    opened, edited = said["c2pa.actions.v2"]["actions"]
    assert opened["action"] == "c2pa.opened"
    assert edited["action"] == "c2pa.edited"
    assert edited["softwareAgent"] == {"name": "fixative", "version": "1"}
    assert edited["parameters"] == edit().parameters
    assert edited["digitalSourceType"].endswith("/algorithmicallyEnhanced")
    assert {key: entry["use"] for key, entry in said["cawg.training-mining"]["entries"].items()} == {
        "cawg.data_mining": "constrained",
        "cawg.ai_inference": "constrained",
        "cawg.ai_training": "notAllowed",
        "cawg.ai_generative_training": "notAllowed",
    }
    (parent,) = manifest["ingredients"]
    assert parent["relationship"] == "parentOf"
    assert parent["instance_id"] == "sha256:" + "ab" * 32
    assert "thumbnail" not in json.dumps(document)
    certificate = x509.load_pem_x509_certificate(files.certificate.read_bytes())
    assert (found.serial, found.signed_by) == (str(certificate.serial_number), "Signer, Test Archive")
    assert (found.manifest, found.source_sha256) == (document["active_manifest"], "ab" * 32)
    before, after = (np.asarray(Image.open(io.BytesIO(data))) for data in (plain, signed))
    np.testing.assert_array_equal(before, after)
    assert len(signed) - len(plain) < 10_000


def test_no_statement_where_the_image_has_none(files: Files) -> None:
    silent = Edit(**{name: getattr(edit(), name) for name in Edit.__slots__} | {"xmp": None})
    assert sign(images.plain("PNG"), silent, settings(files))[1].training_mining is None


def test_changed_pixels_and_missing_manifests_are_found(files: Files) -> None:
    signed, _ = sign(images.plain("PNG"), edit(), settings(files))
    at = signed.rindex(b"IDAT") + 20
    changed = signed[:at] + bytes([signed[at] ^ 1]) + signed[at + 1 :]
    found = read_credentials(changed, "image/png")
    assert found is not None
    assert found.failures == ("assertion.dataHash.mismatch",)
    assert read_credentials(images.plain("PNG"), "image/png") is None
    at = signed.index(b"caBX") + 60
    with pytest.raises(IntegrityError, match="cannot be read"):
        read_credentials(signed[:at] + bytes(40) + signed[at + 40 :], "image/png")


def test_trust_counts_where_authorities_are_named(files: Files, tmp_path: Path) -> None:
    signed, found = sign(images.plain("PNG"), edit(), settings(files))
    assert (found.trusted, found.failures) == (None, ())
    trusting = read_credentials(signed, "image/png", trust_anchors=read_authorities(files.authority))
    assert trusting is not None
    assert (trusting.trusted, trusting.failures) == (True, ())
    others = read_authorities(make_signer(tmp_path).authority)
    doubting = read_credentials(signed, "image/png", trust_anchors=others)
    assert doubting is not None
    assert (doubting.trusted, doubting.failures) == (False, ("signingCredential.untrusted",))


def sign_elsewhere(data: bytes) -> bytes:
    """As a KMS would: the key never comes here."""
    signature: bytes = CALLBACK_KEY[0].sign(data, ec.ECDSA(hashes.SHA256()))
    return signature


def test_a_callback_signs_without_a_key_file(files: Files) -> None:
    CALLBACK_KEY[:] = [serialization.load_pem_private_key(files.key.read_bytes(), None)]
    callback = settings(files, key=None, callback=f"{__name__}:sign_elsewhere")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signer_module, "_callback", lambda name: sign_elsewhere)  # this module has no importable name
        signed, _ = sign(images.plain("JPEG"), edit("image/jpeg"), callback)
    assert read(signed, "image/jpeg", files.authority)[0] == "Trusted"


def test_an_ed25519_key(tmp_path: Path) -> None:
    files = make_signer(tmp_path, kind="ed25519")
    signed, _ = sign(images.plain("PNG"), edit(), settings(files))
    assert read(signed, "image/png", files.authority)[0] == "Trusted"


def test_signers_that_cannot_work(files: Files, tmp_path: Path) -> None:
    other, late = make_signer(tmp_path / "other"), make_signer(tmp_path / "late", days=-1)
    for wrong, message in (
        (settings(files, key=str(other.key)), "nothing can be signed"),
        (settings(late), "nothing can be signed"),
        (settings(files, key=str(tmp_path / "none.pem")), "cannot be read on this machine"),
        (settings(files, key=str(files.certificate)), "cannot be used|nothing can be signed"),
        (settings(files, certificate=str(files.key)), "holds no PEM certificate"),
        (settings(files, key=None, callback="nowhere:sign"), "cannot be loaded"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            check_signer(wrong)
        assert "PRIVATE" not in str(caught.value)
        with pytest.raises(FatalWorkerError, match=message):
            sign(images.plain("PNG"), edit(), wrong)


def test_a_file_that_cannot_be_signed_is_the_files_fault(files: Files) -> None:
    with pytest.raises(EncodeError, match="cannot be signed"):
        sign(b"no picture", edit(), settings(files))


@pytest.mark.parametrize(
    "wrong",
    [
        {"key": "k"},
        {"certificate": "c"},
        {"certificate": "c", "key": "k", "callback": "a:b"},
        {"timestamp_url": "http://a"},
    ],
)
def test_half_a_signer_is_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="certificate"):
        SignerSettings.model_validate(wrong)


def test_the_fingerprint_knows_who_signs_and_no_file(files: Files, tmp_path: Path) -> None:
    def fields(signer: dict[str, Any]) -> dict[str, Any]:
        return provenance_fields(ProvenanceSettings.model_validate({"signer": signer}))

    first = fields(files.settings)
    assert first["signer"] == {"subject": "CN=Signer,O=Test Archive", "algorithm": "es256"}
    assert fields(make_signer(tmp_path / "renewed").settings) == first
    assert fields(make_signer(tmp_path / "other", "Other").settings) != first
    assert fields({})["signer"] is None


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """A URL on this machine, and the requests that came."""
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            seen.append(f"{self.command} {self.path}")
            self.send_error(500)

        def log_message(self, format: str, *args: object) -> None: ...

        do_GET = do_POST = do_HEAD = answer

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}", seen
        http.shutdown()
        thread.join()


def test_only_a_named_time_stamp_authority_is_asked(files: Files, server: tuple[str, list[str]]) -> None:
    url, seen = server
    with pytest.raises(FatalWorkerError, match="time-stamp authority"):
        sign(images.plain("PNG"), edit(), settings(files, timestamp_url=f"{url}/stamp"))
    assert set(seen) == {"POST /stamp"}
    seen.clear()
    sign(images.plain("PNG"), edit(), settings(files))
    assert offline_settings(settings(files))["core"]["allowed_network_hosts"] == []
    assert seen == []


def test_no_remote_manifest_is_fetched(server: tuple[str, list[str]]) -> None:
    url, seen = server
    link = f'xmlns:dcterms="http://purl.org/dc/terms/" dcterms:provenance="{url}/manifest" rdf:about=""'
    data = images.plain("JPEG", xmp=images.XMP.format(extra="").replace('rdf:about=""', link).encode())
    with pytest.raises(c2pa.C2paError):
        c2pa.Reader("image/jpeg", io.BytesIO(data), context=c2pa.Context.from_dict({}))
    assert seen == ["GET /manifest"]  # what c2pa does unless it is told otherwise
    seen.clear()
    with pytest.raises(IntegrityError):
        read_credentials(data, "image/jpeg")
    assert seen == []
