"""The verification of a finished archive as a Prefect flow: choose, attack on Ray, write the report."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from prefect import flow, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE

from flows.progress import observer
from flows.verify_table import verdicts
from pipeline.config import VerifyConfig
from pipeline.errors import PipelineError
from pipeline.ids import sha256_hex
from pipeline.storage import json_bytes
from pipeline.verify.campaign import Campaign, Target, plan_campaign
from pipeline.verify.html import Strip, render
from pipeline.verify.report import campaign_document, write_campaign
from pipeline.verify.trial import TrialResult

STRIPS = 12  # groups and images that the local report shows
AMPLIFIED = 8


@dataclass(slots=True, kw_only=True)
class Verified:
    """What a verification came to."""

    campaign: Campaign
    targets: list[Target]
    document: dict[str, Any] = field(default_factory=dict)
    report_key: str = ""
    # Of the page with pictures, where one was asked for.
    page: Path | None = None
    failed: dict[str, str] = field(default_factory=dict)


class VerificationIncomplete(PipelineError):
    """Some shards could not be attacked. What is measured stays; the same command goes on."""


@task(name="attack", cache_policy=NO_CACHE)
def attack_archive(verified: Verified, pictures: Path | None) -> None:
    """Runs the trials that are not stored yet; keeps their pictures in a local folder."""
    from pipeline.ray_job import Failed, cluster, dashboard_url
    from pipeline.ray_verify import run_campaign

    with cluster(verified.campaign.config.run) as pool:
        observer().note(f"{pool.actors} {pool.device} actors; Ray dashboard: {dashboard_url() or 'off'}")
        observer().step("attack", _planned(verified))
        for result in run_campaign(verified.campaign, pool, verified.targets):
            if isinstance(result, Failed):
                verified.failed[result.shard_id] = result.error
                continue
            observer().advance(1)
            if pictures is not None:
                _keep(result, pictures)


def _planned(verified: Verified) -> int:
    settings = verified.campaign.config.attack
    cells = 3 + 2 * len(settings.purifiers)
    return sum(target.groups * cells + target.edited * len(settings.editors) for target in verified.targets)


def _keep(result: TrialResult, pictures: Path) -> None:
    shard_id = result.key.split("/")[-2]
    folder = pictures / sha256_hex(f"{shard_id}|{result.title}")[:16]  # titles are customers' names
    folder.mkdir(parents=True, exist_ok=True)
    about = {"title": result.title, "shard_id": shard_id, "row": result.row}
    (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")
    for name, data in result.pictures.items():
        (folder / f"{name}.png").write_bytes(data)


@flow(name="verify-archive")
def verify_archive(config: VerifyConfig, out: Path | None = None) -> Verified:
    """Attacks a sample of a protected archive and writes a report. Never touches a manifest.

    Args:
        config: what to attack, and how.
        out: a folder of this machine for the page with pictures. They show originals: keep it to yourself.

    Raises:
        UserError: The attack cannot run as configured.
        VerificationIncomplete: Some shards could not be attacked.
    """
    campaign, targets = plan_campaign(config)
    verified = Verified(campaign=campaign, targets=targets)
    attack_archive(verified, None if out is None else out / "pictures")
    if verified.failed:
        raise VerificationIncomplete("; ".join(f"{shard}: {why}" for shard, why in verified.failed.items()))
    manifests = [target.manifest for target in targets]
    verified.document = campaign_document(campaign, manifests)
    verified.report_key = write_campaign(campaign, verified.document)
    table = verdicts(verified.document)
    create_table_artifact(key="verify-verdict", table=table, description=campaign.destination().url)
    if out is not None:
        strips = _strips(out / "pictures")
        verified.page = out / "report.html"
        verified.page.write_text(render(verified.document, strips), encoding="utf-8")
        (out / "verification.json").write_bytes(json_bytes(verified.document))
        create_markdown_artifact(key="verify-report", markdown=f"Report with pictures: `{verified.page}`")
    return verified


def _strips(pictures: Path) -> list[Strip]:
    """One strip per group or edited image, from the folders that trials left."""
    folders = sorted(pictures.iterdir()) if pictures.is_dir() else []
    return [_strip(folder) for folder in folders[:STRIPS]]


def _strip(folder: Path) -> Strip:
    found = {file.stem: file.read_bytes() for file in sorted(folder.glob("*.png"), key=_place)}
    if "original" in found and "protected" in found:
        difference = {f"difference x{AMPLIFIED}": _difference(found["original"], found["protected"])}
        first = {name: found.pop(name) for name in ("original", "protected")}
        found = first | difference | found
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    return Strip(**about, pictures=found)


def _place(file: Path) -> tuple[bool, str]:
    return file.stem.startswith("drawn"), file.stem


def _difference(left: bytes, right: bytes) -> bytes:
    """The change, amplified around middle grey, as PNG."""
    one, other = (np.asarray(Image.open(io.BytesIO(data)), dtype=np.int16) for data in (left, right))
    amplified = np.clip(128 + AMPLIFIED * (other - one), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(amplified).save(file, "PNG")
    return file.getvalue()
