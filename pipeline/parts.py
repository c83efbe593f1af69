"""Turns a protected unit into the bytes of its part: full-size pixels, encoded, measured as stored, with provenance."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.assets import Asset, Unit
from pipeline.decode import DecodedImage, apply_delta, decode, upright
from pipeline.encode import OutputFormat, choose_format, encode, lost_texts, measure, pixel_sha256_of_bytes
from pipeline.errors import (
    AssetError,
    BudgetExceeded,
    CrashLoop,
    EncodeError,
    ErrorInfo,
    IntegrityError,
    NotFound,
    ProtectError,
)
from pipeline.fuse import Attempt
from pipeline.ids import sha256_hex
from pipeline.job import Job, code_version
from pipeline.provenance.credentials import Edit, sign
from pipeline.provenance.rights import rights_in, with_rights
from pipeline.scale import enlarge_delta
from pipeline.schema import part_schema
from pipeline.shard_index import IMAGE_SUFFIXES
from pipeline.storage import Store

# Pictures do not shrink any further, but level 1 costs nothing to try, and dictionaries would hold whole pictures.
PARQUET_OPTIONS: dict[str, Any] = {
    "compression": "zstd",
    "compression_level": 1,
    "use_dictionary": False,
    "write_page_index": True,
    "write_page_checksum": True,  # the columns beside the image have no hash of their own
}
SUFFIXES = {"png": ".png", "webp": ".webp", "jpeg": ".jpg"}


def build_part(job: Job, unit: Unit, attempt: Attempt) -> bytes:
    """Encodes every healthy asset of a unit, lists the others with their reasons, and returns the part's bytes."""
    processed_at = datetime.now(UTC)
    rows: list[dict[str, Any]] = []
    for asset in unit.assets:
        row: dict[str, Any] = {}
        if asset.failure is None and not attempt.enter(asset.row):
            asset.failure = ErrorInfo("encode", CrashLoop.__name__, "the worker died twice on this image")
        if asset.failure is None:
            try:
                row = _protected_row(job, asset, unit.rung)
            except AssetError as error:
                asset.failure = ErrorInfo.of(error, "encode")
        rows.append({**_common_row(job, unit, asset), **row, "processed_at": processed_at})
    table = pa.Table.from_pylist(rows, part_schema())
    if unit.customer.num_columns:
        table = table.append_column("customer", unit.customer.combine_chunks().to_struct_array())
    return _parquet_bytes(table)


def read_part(destination: Store, key: str, columns: list[str] | None = None) -> pa.Table:
    """Reads a stored part, or some columns of it.

    Raises:
        IntegrityError: It is gone, or a page of it is damaged.
    """
    try:
        with destination.open(key) if columns else pa.BufferReader(destination.get(key)) as stream:
            return pq.read_table(stream, columns=columns, page_checksum_verification=True)
    except (NotFound, pa.ArrowInvalid, OSError) as error:
        raise IntegrityError(f"{destination.url}/{key} is missing or damaged; delete it and run again") from error


def _parquet_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()  # never straight into the store: a writer that dies leaves a file that reads fine
    with pq.ParquetWriter(sink, table.schema, **PARQUET_OPTIONS) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def _common_row(job: Job, unit: Unit, asset: Asset) -> dict[str, Any]:
    failure = asset.failure
    return {
        "row": asset.row,
        "status": "protected" if failure is None else "quarantined",
        "asset_id": asset.asset_id,
        "source_uri": asset.source_uri,
        "source_etag": asset.source_etag,
        "source_sha256": asset.source_sha256,
        "config_fingerprint": job.config_fp,
        "unit_id": unit.unit_id,
        "run_id": job.run_id,
        "attempt": asset.attempt,
        "stage": failure.stage if failure else None,
        "error_type": failure.error_type if failure else None,
        "message": failure.message if failure else None,
    }


def _protected_row(job: Job, asset: Asset, rung: int) -> dict[str, Any]:
    """The columns of a protected row. Budget, PSNR, SSIM and hashes are measured on the bytes that will be stored.

    The objectives are the optimizer's, at its own scale; the sampled check measures them on stored bytes.

    Raises:
        BudgetExceeded: A lossless format does not hold the budget.
        AssetError: The pixels cannot be encoded.
    """
    image = decode(asset.data or b"", limits=job.limits)
    budget = math.floor(job.eps_levels(rung))
    height, width = upright(image.pixels, image.orientation).shape[:2]
    if asset.delta is None:
        raise ProtectError("the optimizer returned nothing for this image")
    pixels = apply_delta(image, enlarge_delta(asset.delta, height, width), budget)
    chosen = choose_format(job.config.job.output.format, image)
    provenance = job.config.job.provenance
    labelled = replace(image, metadata=with_rights(image.metadata, provenance))
    data = encode(labelled, pixels, chosen)
    signature: dict[str, Any] = {}
    if provenance.signer.certificate is not None:
        data, signature = _signed(job, asset, rung, chosen, labelled, data)
    measured = measure(data, image, job.limits)
    if signature and measured.pixel_sha256 != signature.pop("pixel_sha256"):
        raise EncodeError("signing has changed the pixels; report this as a bug")
    if chosen != "jpeg" and measured.linf_levels > budget:
        raise BudgetExceeded(f"stored pixels differ by {measured.linf_levels} levels, the budget is {budget}")
    return {
        "image": {"bytes": data, "path": _file_name(asset.asset_id, SUFFIXES[chosen])},
        "width": measured.width,
        "height": measured.height,
        "format": measured.format,
        "mode": measured.mode,
        "source_format": image.source_format,
        "source_mode": image.source_mode,
        "protected_sha256": sha256_hex(data),
        "pixel_sha256": measured.pixel_sha256,
        "protector": job.config.job.method.name,
        "protector_version": job.protector_version,
        "model_digest": job.model_digest,
        "rung": rung,
        "seed": asset.seed,
        "device": asset.device,
        "torch_version": version("torch"),
        "steps_run": asset.steps,
        "eps_levels": job.eps_levels(rung),
        "eps_linf_measured": measured.linf_levels,
        "psnr": measured.psnr,
        "ssim": measured.ssim,
        "objective_before": asset.objective_before,
        "objective_after": asset.objective_after,
        "metadata_dropped": [*image.metadata.dropped, *lost_texts(image, chosen)],
        "data_mining": rights_in(measured.xmp).get("data_mining"),
        **signature,
    }


def _signed(
    job: Job, asset: Asset, rung: int, chosen: OutputFormat, image: DecodedImage, data: bytes
) -> tuple[bytes, dict[str, Any]]:
    """The encoded image with its Content Credentials, and the columns that name them."""
    pixels = pixel_sha256_of_bytes(data, job.limits)
    method, ladder = job.config.job.method, job.config.job.check.gate.ladder
    edit = Edit(
        title=_file_name(asset.asset_id, SUFFIXES[chosen]),
        mime=f"image/{chosen}",
        source_title=PurePosixPath(asset.asset_id).name,
        source_mime=f"image/{image.source_format.lower()}",
        source_sha256=str(asset.source_sha256),
        software={"name": "fixative", "version": code_version()},
        parameters={
            "protector": method.name,
            "protector_version": job.protector_version,
            "preset": [method.preset, *ladder][rung],
            "eps_levels": job.eps_levels(rung),
            "eps_norm": "linf of 8-bit samples",
            "model_digest": job.model_digest,
            "config_fingerprint": job.config_fp,
            "pixel_sha256": pixels,
        },
        xmp=image.metadata.xmp,
    )
    signed, credentials = sign(data, edit, job.config.job.provenance.signer)
    return signed, {
        "pixel_sha256": pixels,
        "unsigned_sha256": sha256_hex(data),
        "c2pa_manifest": credentials.manifest,
        "signed_by": credentials.signed_by,
        "certificate_serial": credentials.serial,
    }


def _file_name(asset_id: str, suffix: str) -> str:
    """The asset's own file name with the suffix of the format that it is stored in."""
    name = PurePosixPath(asset_id).name
    stem = PurePosixPath(name)
    return f"{stem.stem if stem.suffix.lower() in IMAGE_SUFFIXES else name}{suffix}"
