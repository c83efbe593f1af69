"""Content Credentials (C2PA): a signed manifest of what was done to an image, and reading one back.

The manifest says that Fixative edited the picture, how, and from which original: by its SHA-256 alone, as a parent
ingredient without a picture (no byte of the original goes into the file). Its ``cawg.training-mining`` assertion
repeats the reservation of the image's XMP. A manifest that the original carried vouches for other pixels and is not
taken over.

A signature holds time and randomness: a signed file differs each time, its pixels do not. A part is written once and
never signed again, so a resumed run serves the bytes of the first.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from pipeline.config import SignerSettings
from pipeline.errors import EncodeError, FatalWorkerError, IntegrityError, UserError
from pipeline.provenance.rights import training_mining
from pipeline.provenance.signer import c2pa_library, offline_settings, open_signer

TRAINING_MINING = "cawg.training-mining"
_ACTIONS = "c2pa.actions.v2"
_ENHANCED = "http://cv.iptc.org/newscodes/digitalsourcetype/algorithmicallyEnhanced"
_UNTRUSTED = "signingCredential.untrusted"
_EMPTY_PICTURE = {
    "action": "c2pa.created",
    "digitalSourceType": "http://c2pa.org/digitalsourcetype/empty",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """What a manifest says of one image.

    Attributes:
        title: file name of the stored image; ``source_title`` that of the original.
        mime: media type of the stored image; ``source_mime`` that of the original.
        source_sha256: of the original's bytes.
        software: name and version of what edited it.
        parameters: how, as JSON values.
        xmp: packet of the image, for its reservation.
    """

    title: str
    mime: str
    source_title: str
    source_mime: str
    source_sha256: str
    software: Mapping[str, str]
    parameters: Mapping[str, Any]
    xmp: bytes | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """What a stored file's manifest says, and whether it holds.

    Attributes:
        manifest: its label, a URN.
        signed_by: common name and organisation of the certificate; ``serial`` its number, decimal.
        trusted: whether a trusted authority vouches for the certificate; None where none was given to ask.
        failures: codes of what does not hold, empty for a valid one; trust counts only where it was asked for.
        parameters: of the edit; ``software`` what made it.
        source_sha256: of the parent ingredient.
        training_mining: use by key; None without the assertion.
        pictures: resources that hold a picture.
    """

    manifest: str
    signed_by: str
    serial: str
    trusted: bool | None
    failures: tuple[str, ...]
    software: Mapping[str, str] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    source_sha256: str | None = None
    training_mining: Mapping[str, Mapping[str, str]] | None = None
    pictures: tuple[str, ...] = ()


def sign(data: bytes, edit: Edit, settings: SignerSettings) -> tuple[bytes, Credentials]:
    """Returns the file with its signed manifest, and that manifest as read back from it.

    Raises:
        EncodeError: This file cannot be signed.
        FatalWorkerError: No file can be: the signer is wrong, or its time-stamp authority does not answer.
    """
    c2pa = c2pa_library()
    try:
        signer, context = open_signer(settings)
    except UserError as error:
        raise FatalWorkerError(str(error)) from error
    try:
        signed = _signed(data, edit.mime, _definition(edit), signer, context)
    except c2pa.C2paError as error:
        try:
            check_signer(settings)
        except UserError as wrong:
            raise FatalWorkerError(f"{wrong}; what is done stays") from wrong
        raise EncodeError(f"the image cannot be signed: {error}") from error
    found = read_credentials(signed, edit.mime)
    if found is None or found.failures or found.pictures:
        raise EncodeError(f"the signed image does not hold its manifest: {found}")
    return signed, found


def check_signer(settings: SignerSettings) -> None:
    """Signs a pixel.

    Raises:
        UserError: That fails.
    """
    c2pa = c2pa_library()
    try:
        signer, context = open_signer(settings)
        pixel, created = io.BytesIO(), {"label": _ACTIONS, "data": {"actions": [_EMPTY_PICTURE]}}
        Image.new("L", (1, 1)).save(pixel, "PNG")
        definition = {"claim_generator_info": [{"name": "fixative"}], "assertions": [created]}
        _signed(pixel.getvalue(), "image/png", definition, signer, context)
    except c2pa.C2paError as error:
        raise UserError(
            f"nothing can be signed with certificate {settings.certificate}: {error}. Mend job.provenance.signer (an "
            "expired certificate, a key of another one, a time-stamp authority that does not answer?) and run again"
        ) from error


def read_credentials(data: bytes, mime: str, *, trust_anchors: str = "") -> Credentials | None:
    """Reads and validates the manifest of a file, offline; None if it has none.

    Args:
        data: the file.
        mime: its media type.
        trust_anchors: PEM certificates of authorities; where given, a signer that none vouches for is a failure.

    Raises:
        UserError: c2pa is not installed.
        IntegrityError: There is something, but no manifest that can be read.
    """
    c2pa = c2pa_library()
    try:
        context = c2pa.Context.from_dict(offline_settings(trust_anchors=trust_anchors))
        with c2pa.Reader.try_create(mime, io.BytesIO(data), context=context) or _Nothing() as reader:
            if isinstance(reader, _Nothing):
                return None
            document, state = json.loads(reader.json()), reader.get_validation_state()
    except c2pa.C2paError as error:
        raise IntegrityError(f"its C2PA manifest cannot be read: {error}") from error
    return _credentials(document, state, asked=bool(trust_anchors))


def check_credentials(found: Credentials, row: Mapping[str, Any], xmp: bytes | None) -> list[str]:
    """What of a manifest does not hold, or disagrees with the image's row and XMP; empty when all is well."""
    problems = [f"signature: {code}" for code in found.failures]
    problems += [f"picture in the manifest: {name}" for name in found.pictures]
    facts = {
        "c2pa_manifest": found.manifest,
        "signed_by": found.signed_by,
        "certificate_serial": found.serial,
        "source_sha256": found.source_sha256,
        **{name: found.parameters.get(name) for name in PARAMETERS},
    }
    problems += [
        f"{name}: the manifest says {said}, the row {row[name]}" for name, said in facts.items() if said != row[name]
    ]
    if found.training_mining != training_mining(xmp):
        problems.append("training-mining: the manifest says another thing than plus:DataMining of the XMP")
    return problems


PARAMETERS = ("protector", "protector_version", "eps_levels", "model_digest", "config_fingerprint", "pixel_sha256")
"""Columns of a row that its manifest repeats as parameters of the edit."""


class _Nothing:
    """Stands for a file without a manifest."""

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *_: object) -> None: ...


def _definition(edit: Edit) -> dict[str, Any]:
    software = dict(edit.software)
    entries = training_mining(edit.xmp)
    opened = {"action": "c2pa.opened", "parameters": {"ingredientIds": ["original"]}}
    edited = {
        "action": "c2pa.edited",
        "softwareAgent": software,
        "digitalSourceType": _ENHANCED,
        "description": "Protected against misuse by diffusion models: an imperceptible perturbation was added.",
        "parameters": dict(edit.parameters),
    }
    assertions = [{"label": _ACTIONS, "created": True, "data": {"actions": [opened, edited]}}]
    if entries is not None:
        assertions.append({"label": TRAINING_MINING, "created": True, "data": {"entries": entries}})
    return {
        "claim_generator_info": [software],
        "title": edit.title,
        # Given as facts, not as a file: then there is nothing of which c2pa could keep a thumbnail or a manifest.
        "ingredients": [
            {
                "title": edit.source_title,
                "format": edit.source_mime,
                "instance_id": f"sha256:{edit.source_sha256}",
                "relationship": "parentOf",
                "label": "original",
            }
        ],
        "assertions": assertions,
    }


def _signed(data: bytes, mime: str, definition: dict[str, Any], signer: Any, context: Any) -> bytes:
    out = io.BytesIO()
    with c2pa_library().Builder(definition, context=context) as builder:
        builder.sign(signer, mime, io.BytesIO(data), out)
    return out.getvalue()


def _credentials(document: dict[str, Any], state: str | None, *, asked: bool) -> Credentials:
    label = document["active_manifest"]
    manifest = document["manifests"][label]
    results = document.get("validation_results", {}).get("activeManifest", {})
    codes = [item["code"] for item in results.get("failure", [])]
    failures = [code for code in codes if asked or code != _UNTRUSTED]
    if state not in ("Valid", "Trusted") and not codes:
        failures.append(str(state))
    signature = manifest.get("signature_info", {})
    names = (signature.get("common_name"), signature.get("issuer"))
    said: dict[str, Any] = {item["label"]: item["data"] for item in manifest.get("assertions", [])}
    edits = [item for item in said.get(_ACTIONS, {}).get("actions", []) if item["action"] == "c2pa.edited"]
    parents = [item for item in manifest.get("ingredients", []) if item.get("relationship") == "parentOf"]
    pictures = [
        f"{owner}/{what}"
        for owner, part in document["manifests"].items()
        for holder in (part, *part.get("ingredients", []))
        for what in ("thumbnail",)
        if what in holder
    ]
    return Credentials(
        manifest=label,
        signed_by=", ".join(name for name in names if name),
        serial=str(signature.get("cert_serial_number", "")),
        trusted=state == "Trusted" if asked else None,
        failures=tuple(failures),
        software=edits[0].get("softwareAgent", {}) if edits else {},
        parameters=edits[0].get("parameters", {}) if edits else {},
        source_sha256=parents[0].get("instance_id", "").removeprefix("sha256:") if parents else None,
        training_mining=said.get(TRAINING_MINING, {}).get("entries"),
        pictures=tuple(pictures),
    )
