"""The verification of a finished archive as a Prefect flow: choose, attack on Ray, write the report."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE

from flows.progress import observer
from flows.verify_pictures import keep, kept_trials, publish_strip, read_strips
from flows.verify_table import verdicts
from pipeline.config import VerifyConfig
from pipeline.errors import NotFound, PipelineError, UserError
from pipeline.storage import get_json, json_bytes, same_or_nested
from pipeline.verify.campaign import Campaign, Target, plan_campaign, progress
from pipeline.verify.html import Strip, render
from pipeline.verify.report import campaign_document, write_campaign


@dataclass(slots=True, kw_only=True)
class Verified:
    """What a verification came to."""

    campaign: Campaign
    targets: list[Target]
    document: dict[str, Any] = field(default_factory=dict)
    report_key: str = ""
    # Of the page with pictures, where one was asked for.
    page: Path | None = None
    # Shards that could not be attacked, with the reason.
    failed: dict[str, str] = field(default_factory=dict)


class VerificationIncomplete(PipelineError):
    """Some shards could not be attacked. What is measured stays and is reported; the same command goes on."""

    def __init__(self, verified: Verified) -> None:
        super().__init__("; ".join(f"{shard}: {why}" for shard, why in verified.failed.items()))
        self.verified = verified


@task(name="attack", cache_policy=NO_CACHE)
def attack_archive(verified: Verified, pictures: Path | None) -> None:
    """Runs the trials that are not stored yet; keeps their pictures in a local folder."""
    from pipeline.ray_job import Failed, cluster, dashboard_url
    from pipeline.ray_verify import run_campaign

    campaign = verified.campaign
    counts = progress(campaign, verified.targets)
    observer().step("attack", counts["planned"]["trials"], counts["done"]["trials"])
    if counts["done"] == counts["planned"]:
        return
    with cluster(campaign.config.run, "verify-archive") as pool:
        observer().note(f"{pool.actors} {pool.device} actors; Ray dashboard: {dashboard_url() or 'off'}")
        for result in run_campaign(campaign, pool, verified.targets):
            if isinstance(result, Failed):
                verified.failed[result.shard_id] = result.error
                continue
            observer().advance(1)
            if pictures is not None:
                keep(result, pictures)


@flow(name="verify-archive")
def verify_archive(config: VerifyConfig, out: Path | None = None) -> Verified:
    """Attacks a sample of a protected archive and writes a report. Never touches a manifest.

    Args:
        config: what to attack, and how.
        out: a folder of this machine for the page with pictures. They show originals: keep it to yourself. Prefect
            gets the page's place, and pictures only of what anybody can make from the published archive.

    Raises:
        UserError: The attack cannot run as configured.
        VerificationIncomplete: Some shards could not be attacked; holds what was measured on the others.
    """
    campaign, targets = plan_campaign(config)
    if out is not None:
        _check_apart(out, campaign, targets)
    verified = Verified(campaign=campaign, targets=targets)
    pictures = None if out is None else out / "pictures" / campaign.campaign_id
    attack_archive(verified, pictures)
    counts = progress(campaign, targets)
    _tell_shortfall(counts)
    document = campaign_document(campaign, [target.manifest for target in targets])
    document["attack"]["digests"] = dict(campaign.digests)
    verified.document = document | counts | {"failed": verified.failed}
    verified.report_key = _store(campaign, verified.document)
    table = verdicts(verified.document)
    create_table_artifact(key="verify-verdict", table=table, description=campaign.destination().url)
    if out is not None and pictures is not None:
        strips = read_strips(pictures)
        verified.page = _write_page(verified.document, out, strips)
        _tell_missing(verified.document, pictures)
        create_markdown_artifact(key="verify-report", markdown=f"Report with pictures: `{verified.page}`")
        publish_strip(strips)
    if verified.failed:
        raise VerificationIncomplete(verified)
    return verified


def _check_apart(out: Path, campaign: Campaign, targets: Sequence[Target]) -> None:
    for url in {campaign.destination().url, *(campaign.source(target).url for target in targets)}:
        if same_or_nested(str(out), url):
            raise UserError(f"--out {out} and {url} overlap: its pictures would get into the archive. Choose another")


def _tell_shortfall(counts: dict[str, dict[str, int]]) -> None:
    for kind, name in (("groups", "groups"), ("images", "edited images")):
        planned, done = counts["planned"][kind], counts["done"][kind]
        if done < planned:
            observer().note(f"{done} of {planned} {name}: the chosen shards hold no more, or could not be attacked")


def _store(campaign: Campaign, document: dict[str, Any]) -> str:
    """Stores the report; one of an earlier run that missed shards makes room for it."""
    destination, folder = campaign.destination(), f"reports/verify-{campaign.campaign_id}"
    with suppress(NotFound):
        if get_json(destination, f"{folder}/verification.json")["failed"]:
            # The page first: as long as the document is there, a run that dies in between is repeated.
            destination.delete(f"{folder}/report.html")
            destination.delete(f"{folder}/verification.json")
    return write_campaign(campaign, document)


def _tell_missing(document: dict[str, Any], pictures: Path) -> None:
    done, here = document["done"]["trials"], kept_trials(pictures)
    if here < done:
        observer().note(f"{done - here} trials were done before; their pictures are not here")


def _write_page(document: dict[str, Any], out: Path, strips: Sequence[Strip]) -> Path:
    """Writes the report with the pictures that trials left on this machine."""
    page = out / "report.html"
    out.mkdir(parents=True, exist_ok=True)
    page.write_text(render(document, strips), encoding="utf-8")
    (out / "verification.json").write_bytes(json_bytes(document))
    return page
