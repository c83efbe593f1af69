"""Writes what a run's checks found: every number that a report shows, with sample size and interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.errors import AlreadyExists
from pipeline.job import Job, code_version
from pipeline.manifest import Manifest
from pipeline.plan import Shard
from pipeline.storage import Store, get_json, json_bytes
from pipeline.verify.campaign import Campaign
from pipeline.verify.cells import build_tables
from pipeline.verify.check import stored_checks
from pipeline.verify.edit_trial import EDIT_METRIC
from pipeline.verify.editors import EDITORS
from pipeline.verify.further import face_cells, face_gates, not_measured, questions
from pipeline.verify.html import render
from pipeline.verify.metrics.base import Facts
from pipeline.verify.metrics.faces import IDENTITY
from pipeline.verify.scores import Score
from pipeline.verify.statistics import CONFIDENCE, RESAMPLES, Survival, survival
from pipeline.verify.tables import Question, Table
from pipeline.verify.trial import METRIC, Attack
from pipeline.verify.trials import QUESTION, attack_of, selection_of, stored_scores, stored_shortfalls, stored_tables

SCHEMA_VERSION = 2
MEASURE = (
    "share of the objective's gain that is left after the purifier, on decoded stored bytes; "
    "gain = objective(protected) - objective(clean), both treated by the same purifier; "
    "purified at full size, or at the model's training scale where the name says so"
)
LIBRARIES = ("torch", "diffusers", "transformers", "ray", "pillow")
EDITING = Question(metric=EDIT_METRIC, primary=True)


def write_verification(job: Job, shards: Sequence[Shard], manifests: Sequence[Manifest]) -> tuple[str, list[Survival]]:
    """Writes ``reports/<run_id>/verification.json`` and ``report.html`` over all committed shards.

    Neither holds a picture: those of originals must not lie beside the protected ones. `fixative verify --out`
    draws them on the machine of whoever asks.

    Returns:
        The JSON's key, and the objective left over all shards.
    """
    destination = job.destination()
    per_shard: dict[str, Any] = {}
    everything: list[dict[str, list[float]]] = []
    committed = {manifest.shard_id: manifest for manifest in manifests}
    on_rung = [_on_its_rung(shard, committed) for shard in shards]
    for shard in on_rung:
        checks = [check.objective for check in stored_checks(destination, shard).values()]
        everything += checks
        per_shard[shard.shard_id] = _of_shard(committed[shard.shard_id])
    total = survival(everything)
    document = {
        **_about("protect", job.run_id, destination),
        "config_fingerprint": job.config_fp,
        "protector": job.config.job.method.name,
        "ladder": list(job.ladder),
        "model_digest": job.model_digest,
        "model": _name(job.model),
        "measure": MEASURE,
        "interval": {"kind": "percentile bootstrap over images", "confidence": CONFIDENCE, "resamples": RESAMPLES},
        "purifiers": sorted(job.config.job.check.purifiers),
        "training_scale": job.base_size,
        "sampled": len(everything),
        "survival": [asdict(item) for item in total],
        "customization": [table.to_dict() for table in stored_tables(job, on_rung)],
        "attack": _attack(attack_of(job)) if job.config.job.check.groups else None,
        "too_few_groups": stored_shortfalls(destination, _choices(job, on_rung)),
        "shards": per_shard,
    }
    return _write(destination, job.run_id, document), total


def campaign_document(campaign: Campaign, manifests: Sequence[Manifest]) -> dict[str, Any]:
    """The document of a later verification, from the scores that are stored."""
    destination = campaign.destination()
    scores = stored_scores(destination, campaign.trial_keys())
    customization, editing = campaign_tables(scores, campaign.metrics)
    names, settings = {score.metric for score in scores}, campaign.config.attack
    first = manifests[0]
    choices = {PurePosixPath(item.key).stem: item.key for item in destination.list(campaign.chosen_prefix)}
    return {
        **_about("verify", campaign.campaign_id, destination),
        "config_fingerprint": campaign.config_fp,
        "protector": first.protector,
        "model_digest": first.model_digest,
        "purifiers": sorted(settings.purifiers),
        "settings": settings.model_dump(mode="json")
        | {"models": _named(settings.models), "metrics": _named(settings.metrics)},
        "attack": _attack(campaign.attack),
        "metrics": [facts.to_dict() for facts in campaign.metrics if facts.name in names],
        "absent": [absent.to_dict() for absent in not_measured(names, settings.metrics)],
        "survival": [],
        "customization": [table.to_dict() for table in customization],
        "editing": [table.to_dict() for table in editing],
        "too_few_groups": stored_shortfalls(destination, choices),
        "shards": {manifest.shard_id: _of_shard(manifest) for manifest in manifests},
    }


def campaign_tables(scores: Sequence[Score], measured: Sequence[Facts]) -> tuple[list[Table], list[Table]]:
    """The tables of customization and of editing; measured: the metrics behind the scores."""
    edited = [score for score in scores if score.attack in EDITORS]
    customized = [score for score in scores if score.attack not in EDITORS]
    further = [facts for facts in measured if facts.name not in (METRIC, EDIT_METRIC)]
    tables = (
        build_tables(customized, [QUESTION, *questions(further, customized)], gates=face_gates(customized))
        if customized
        else []
    )
    return (
        [_with_figures(table, customized) for table in tables],
        build_tables(edited, [EDITING, *questions(further, edited)]) if edited else [],
    )


def _with_figures(table: Table, scores: Sequence[Score]) -> Table:
    return replace(table, figures=face_cells(scores, table.attack)) if table.question.metric == IDENTITY else table


def write_campaign(campaign: Campaign, document: dict[str, Any]) -> str:
    """Stores the document and its page beside the archive, under the campaign's own name; returns the JSON's key."""
    return _write(campaign.destination(), f"verify-{campaign.campaign_id}", document)


def read_verification(destination: Store, key: str) -> list[Survival]:
    """The objective left over all shards, from a stored report."""
    return [Survival(**entry) for entry in get_json(destination, key)["survival"]]


def _write(destination: Store, folder: str, document: dict[str, Any]) -> str:
    key = f"reports/{folder}/verification.json"
    for name, data in (
        (key, json_bytes(document)),
        (f"reports/{folder}/report.html", render(document, []).encode()),
    ):
        with suppress(AlreadyExists):  # this run wrote it before it was interrupted
            destination.put_new(name, data)
    return key


def _about(kind: str, run_id: str, destination: Store) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "run_id": run_id,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "destination": destination.url,
        "code_version": code_version(),
        "versions": {name: version(name) for name in LIBRARIES},
    }


def _attack(attack: Attack) -> dict[str, Any]:
    """How models are customized; checkpoints by name and metrics by what they are, never by a place on this machine."""
    return {
        "customizer": attack.customizer,
        "preset": attack.preset,
        "overrides": dict(attack.overrides),
        "models": _named(attack.models),
        "side": attack.side,
        "generated": attack.generated,
        "seed": attack.seed,
        "metrics": attack.further.identity,
    }


def _named(places: Mapping[Any, str]) -> dict[str, str]:
    return {str(kind): _name(at) for kind, at in places.items()}


def _name(at: str) -> str:
    """The last part of a folder; hub ids and embedded models as they are."""
    folder = Path(at).expanduser()
    return folder.resolve().name if folder.is_dir() else at


def _choices(job: Job, shards: Sequence[Shard]) -> dict[str, str]:
    """Where the choice of groups of each shard is stored."""
    asked = shards if job.config.job.check.groups else ()
    return {shard.shard_id: selection_of(job, shard).groups_key for shard in asked}


def _on_its_rung(shard: Shard, committed: dict[str, Manifest]) -> Shard:
    return replace(shard, rung=committed[shard.shard_id].rung)


def _of_shard(manifest: Manifest) -> dict[str, Any]:
    return {
        "rows_in": manifest.rows_in,
        "rows_ok": manifest.rows_ok,
        "rows_quarantined": manifest.rows_quarantined,
        "rung": manifest.rung,
        **manifest.verify,
    }
