"""A later verification of a finished archive: which groups and images of which shards are attacked, and how."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.config import AttackSettings, VerifyConfig
from pipeline.decode import DecodeLimits
from pipeline.errors import IntegrityError, UserError
from pipeline.ids import asset_seed, fingerprint, sha256_hex
from pipeline.job import archive_store, code_version, model_folder, storage_options
from pipeline.manifest import SUCCESS_KEY, Manifest, read_success
from pipeline.plan import BINDING_KEY, Shard, load_index
from pipeline.storage import Store, check_conditional_writes, get_json, in_parallel, open_store
from pipeline.verify.attack_models import AttackModels, ModelKind, ModelMissing, with_embedded
from pipeline.verify.customizers import customizer
from pipeline.verify.digest import folder_digest
from pipeline.verify.edit_trial import EDIT_METRIC, EditTrial
from pipeline.verify.editors import EDITORS
from pipeline.verify.editors.base import Edit
from pipeline.verify.further import AskedMetrics, ask_metrics
from pipeline.verify.groups import DEFAULT_CLASS, LEAST_LIKENESS, Candidate
from pipeline.verify.metrics.base import COSINE_DELTA, Facts, Reference
from pipeline.verify.metrics.registry import INSTALLED
from pipeline.verify.purifiers import PURIFIERS, check_purifiers
from pipeline.verify.specimens import Specimens
from pipeline.verify.trial import METRIC, Attack, Trial, cells_of
from pipeline.verify.trials import Selection, shard_trials, squares
from protectors.model_files import ModelError, model_base_size
from protectors.reference import NANO_EMBED, ReferenceModelError, reference_path

DECIDING = ("torch", "diffusers", "transformers", "peft", "numpy")
"""Libraries with another version of which pixels and scores may be others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A committed shard and how much of it is attacked."""

    shard: Shard
    manifest: Manifest
    groups: int
    edited: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Campaign:
    """A resolved verification. Plain data: it is sent to every process of the run."""

    config: VerifyConfig
    # Names everything that decides the numbers: settings and what their names stand for, the attacker's checkpoints and
    # the model that judges, the shards, the code and its libraries.
    campaign_id: str
    attack: Attack
    # What is measured, and with which weights.
    metrics: tuple[Facts, ...]
    # Of the checkpoints that the attacks load, by kind.
    digests: Mapping[str, str]
    # What the destination is bound to.
    config_fp: str
    # What images were accepted when they were protected.
    limits: DecodeLimits

    @property
    def prefix(self) -> str:
        """Where its results lie in the destination."""
        return f"verifications/{self.campaign_id}/"

    @property
    def groups_prefix(self) -> str:
        """Where its trials on groups lie, by shard."""
        return f"{self.prefix}groups/"

    @property
    def images_prefix(self) -> str:
        """Where its trials on single images lie, by shard."""
        return f"{self.prefix}images/"

    @property
    def chosen_prefix(self) -> str:
        """Where its choices of groups lie, by shard."""
        return f"{self.prefix}chosen/"

    def destination(self) -> Store:
        """The protected archive."""
        return _destination(self.config)

    def source(self, target: Target) -> Store:
        """The archive that the shard was made from: the one given, or where its manifest says."""
        if self.config.source is not None:
            return archive_store(self.config.source, self.config.run.s3)[0]
        uri, key = target.manifest.source["uri"], target.manifest.source["key"]
        return open_store(str(uri).removesuffix(f"/{key}"), storage_options(self.config.run.s3))

    def trial_keys(self, shard_id: str = "") -> list[str]:
        """The keys of the trials that are stored, of one shard or of all."""
        destination, prefixes = self.destination(), (self.groups_prefix, self.images_prefix)
        return [item.key for prefix in prefixes for item in destination.list(prefix + shard_id)]


def plan_campaign(config: VerifyConfig) -> tuple[Campaign, list[Target]]:
    """Checks every name, and deals groups and images out to the published shards by hash.

    Raises:
        UserError: An attack, a model or a column is unknown or missing, nothing was ever protected here, or the store
            cannot refuse a second writer.
        IntegrityError: A chosen manifest is not the one that was published.
    """
    settings = config.attack
    models = with_embedded(settings.models)
    _check_attacks(settings, models)
    try:
        folders = {kind: Path(model_folder(name)) for kind, name in models.items()}
        side = model_base_size(str(folders[ModelKind.LATENT]))
    except (ModelError, ReferenceModelError) as error:
        raise UserError(str(error)) from error
    destination = _destination(config)
    targets = _targets(destination, settings)
    check_conditional_writes(destination)
    binding = get_json(destination, BINDING_KEY)
    digests = {str(kind): folder_digest(folders[kind]) for kind in models if _uses(settings, kind, models)}
    further = _further(settings)
    fields = {
        "attack": settings.model_dump(mode="json", exclude={"models", "metrics"}),
        "parameters": _parameters(settings),
        "models": digests,
        "embedder": folder_digest(reference_path(NANO_EMBED)),
        "least_likeness": LEAST_LIKENESS,
        "shards": [[target.shard.shard_id, target.manifest.logical_sha256] for target in targets],
        "config": binding["config_fingerprint"],
        "code": code_version(),
        "versions": {name: version(name) for name in DECIDING},
    }
    if further.facts:
        fields["metrics"] = further.identity
    campaign = Campaign(
        config=config,
        campaign_id=fingerprint(fields)[:16],
        attack=Attack(
            customizer=settings.customizer,
            preset=settings.customizer_preset,
            overrides=settings.customizer_overrides,
            models=models,
            side=side,
            generated=settings.generated,
            seed=settings.seed,
            further=further,
        ),
        metrics=(*own_facts(), *further.facts),
        digests=digests,
        config_fp=binding["config_fingerprint"],
        limits=DecodeLimits(**binding["fields"]["limits"]),
    )
    return campaign, targets


def _further(settings: AttackSettings) -> AskedMetrics:
    """The metrics that are asked for, of what is attacked here; actors may have another working directory."""
    folders = {name: at if at == INSTALLED else str(Path(at).resolve()) for name, at in settings.metrics.items()}
    attacked = ((settings.groups, Reference.PHOTOS), (settings.edited, Reference.ORIGINALS))
    return ask_metrics(folders, tuple(reference for count, reference in attacked if count))


def own_facts() -> list[Facts]:
    """What every verification measures."""
    nano_embed = folder_digest(reference_path(NANO_EMBED))
    alike = "mean cosine by nano-embed to photos of the subject that the attacker does not have"
    kept = "RGB, Gaussian window of 11 pixels, sigma 1.5, inside the borders"
    return [
        Facts(name=METRIC, better="down", how=alike, weights=nano_embed, delta=COSINE_DELTA),
        Facts(name=EDIT_METRIC, better="down", how=kept, delta=COSINE_DELTA),
    ]


def _destination(config: VerifyConfig) -> Store:
    return open_store(config.destination, storage_options(config.run.s3), single_writer=config.run.single_writer)


def _check_attacks(settings: AttackSettings, models: Mapping[ModelKind, str]) -> None:
    check_purifiers(settings.purifiers, models)
    customizer(settings.customizer, settings.customizer_preset, settings.customizer_overrides)
    for name in settings.editors:
        if name not in EDITORS:
            raise UserError(f"no editor named {name!r}; `fixative attack list` shows what there is")
        if EDITORS[name].needs not in models:
            raise ModelMissing(EDITORS[name].needs)
    if not settings.groups and not settings.edited:
        raise UserError("nothing to attack: ask for --groups or --edited images")


def _parameters(settings: AttackSettings) -> dict[str, Any]:
    """What the names of presets, purifiers and editors stand for in this version."""
    chosen = customizer(settings.customizer, settings.customizer_preset, settings.customizer_overrides)
    return {
        "customizer": chosen.parameters(),
        "purifiers": {name: PURIFIERS[name].parameters() for name in settings.purifiers},
        "editors": {name: EDITORS[name].parameters() for name in settings.editors},
    }


def _uses(settings: AttackSettings, kind: ModelKind, models: Mapping[ModelKind, str]) -> bool:
    """Whether an attack loads this kind of checkpoint; all images are brought to the latent model's size."""
    others = AttackModels({name: folder for name, folder in models.items() if name is not kind})
    purifiers = any(PURIFIERS[name].missing(others) is kind for name in settings.purifiers)
    editors = settings.edited > 0 and any(EDITORS[name].needs is kind for name in settings.editors)
    return kind is ModelKind.LATENT or purifiers or editors


def _targets(destination: Store, settings: AttackSettings) -> list[Target]:
    """Deals groups and images out in rounds over the published shards, in an order that their hashes decide.

    Where columns name subjects, groups go to shards that have them; an archive may hold folders of images beside.
    """
    success = read_success(destination)
    if success is None:
        raise UserError(f"{destination.url} holds no {SUCCESS_KEY}: no run has finished here yet")
    # Originals have been replaced, or taken away: there is nothing left to compare with.
    names = {PurePosixPath(key).stem: key for key, entry in success["manifests"].items() if entry["rows_ok"]}
    open_names = names.keys() - success["superseded"].keys() - success.get("gone", {}).keys()
    if not open_names:
        raise UserError(f"{destination.url} holds no protected images whose originals are still there")
    ranked = sorted(open_names, key=lambda name: sha256_hex(f"{settings.salt}|{name}"))
    entries = {name: (names[name], success["manifests"][names[name]]["sha256"]) for name in ranked}
    grouped = _with_columns(destination, entries, settings)
    groups, edited = _shares(settings.groups, grouped), _shares(settings.edited, ranked)
    chosen = [entry for name, entry in entries.items() if groups.get(name) or edited[name]]
    return [
        Target(
            shard=_shard(manifest),
            manifest=manifest,
            groups=groups.get(manifest.shard_id, 0),
            edited=edited[manifest.shard_id],
        )
        for manifest in in_parallel(partial(_published, destination), chosen)
    ]


def _with_columns(destination: Store, entries: Mapping[str, tuple[str, str]], settings: AttackSettings) -> list[str]:
    """The shards that groups can come from, in the order of their entries; no more of them than groups."""
    asked = {settings.subject_column, settings.class_column} - {None}
    if not settings.groups or not asked:
        return list(entries)
    shards = (_shard(_published(destination, entry)) for entry in entries.values())
    found = (shard.shard_id for shard in shards if asked <= set(load_index(destination, shard).schema.names))
    chosen = list(islice(found, settings.groups))
    if not chosen:
        raise UserError(f"no published shard has the columns {', '.join(sorted(map(str, asked)))}")
    return chosen


def _shares(count: int, shards: Sequence[str]) -> dict[str, int]:
    """How many of `count` things fall to each shard: as evenly as can be, the first ones get the rest."""
    return {name: count // len(shards) + (place < count % len(shards)) for place, name in enumerate(shards)}


def _published(destination: Store, entry: tuple[str, str]) -> Manifest:
    key, digest = entry
    data = destination.get(key)
    if sha256_hex(data) != digest:
        raise IntegrityError(f"{destination.url}/{key} is not the manifest that was published")
    return Manifest(**json.loads(data))


def _shard(manifest: Manifest) -> Shard:
    source = manifest.source
    return Shard(
        shard_id=manifest.shard_id,
        kind=source["kind"],
        key=source["key"],
        etag=source["etag"],
        size=source["size"],
        rows=manifest.rows_in,
        units=0,  # manifests do not tell; only listings of plans show it
        plan_id=manifest.plan_id,
        rung=manifest.rung,
    )


def prepare_target(campaign: Campaign, target: Target) -> Iterator[Trial | EditTrial]:
    """Yields the trials of one shard that are not stored yet.

    Raises:
        IntegrityError: A stored image is not what its row says.
        SourceChanged: An original is no longer there.
    """
    settings, shard_id = campaign.config.attack, target.shard.shard_id
    specimens = Specimens(
        destination=campaign.destination(),
        source=campaign.source(target),
        shard=target.shard,
        config_fp=target.manifest.config_fingerprint,
        manifest=target.manifest,
        subject_column=settings.subject_column,
        class_column=settings.class_column,
    )
    selection = Selection(
        groups=target.groups,
        groups_key=f"{campaign.chosen_prefix}{shard_id}.json",
        salt=settings.salt,
        side=campaign.attack.side,
        purifiers=settings.purifiers,
        limits=campaign.limits,
    )
    stored = set(campaign.trial_keys(shard_id))
    if target.groups:
        yield from shard_trials(specimens, selection, f"{campaign.groups_prefix}{shard_id}/", stored)
    for candidate in _edited(specimens.candidates(), target.edited, settings.salt):
        prefix = f"{campaign.images_prefix}{shard_id}/{candidate.source_sha256[:12]}"
        keys = {name: f"{prefix}-{name}.json" for name in settings.editors}
        if missing := {name: key for name, key in keys.items() if key not in stored}:
            yield from _edit_trials(campaign, specimens, selection, candidate, missing)


def _edited(candidates: Sequence[Candidate], count: int, salt: str) -> list[Candidate]:
    """The images of one shard that are edited, by hash; equal ones count once."""
    distinct = {item.source_sha256: item for item in sorted(candidates, key=lambda item: item.asset_id)}
    return sorted(distinct.values(), key=lambda item: sha256_hex(f"{salt}|edit|{item.source_sha256}"))[:count]


def _edit_trials(
    campaign: Campaign, specimens: Specimens, selection: Selection, candidate: Candidate, missing: Mapping[str, str]
) -> Iterator[EditTrial]:
    wish, word = campaign.config.attack.edit_prompt, candidate.class_word
    name, shard_id = candidate.source_sha256, specimens.shard.shard_id
    clean = squares(specimens.originals([candidate]), selection)[name]
    protected = squares(specimens.protected([candidate]), selection)[name]
    for editor, key in missing.items():
        yield EditTrial(
            key=key,
            shard_id=shard_id,
            asset_id=candidate.asset_id,
            unit=f"{shard_id}/{name[:12]}",
            editor=editor,
            edit=Edit(
                target=wish if word is None else f"{wish} of a {word}", source=f"a photo of a {word or DEFAULT_CLASS}"
            ),
            clean=clean,
            protected=protected,
            purifiers=selection.purifiers,
            seed=asset_seed(name, str(campaign.attack.seed), editor),
        )


def progress(campaign: Campaign, targets: Sequence[Target]) -> dict[str, dict[str, int]]:
    """What was planned and what is stored of it: groups and edited images that are complete, and single trials."""
    settings = campaign.config.attack
    cells, editors = len(cells_of(list(set(settings.purifiers)))), len(set(settings.editors))
    planned = {"groups": sum(target.groups for target in targets), "images": sum(target.edited for target in targets)}
    stored = [PurePosixPath(key).relative_to(campaign.prefix).parts for key in campaign.trial_keys()]
    trials = Counter((kind, shard, name.partition("-")[0]) for kind, shard, name in stored)
    needed = {"groups": cells, "images": editors}
    complete = Counter(kind for (kind, _, _), count in trials.items() if count == needed[kind])
    return {
        "planned": {**planned, "trials": sum(planned[kind] * needed[kind] for kind in planned)},
        "done": {**{kind: complete[kind] for kind in planned}, "trials": len(stored)},
    }
