"""A later verification of a finished archive: which groups and images of which shards are attacked, and how."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from pipeline.config import VerifyConfig
from pipeline.decode import DecodeLimits
from pipeline.errors import IntegrityError, UserError
from pipeline.ids import asset_seed, fingerprint, sha256_hex
from pipeline.job import code_version, model_folder, storage_options
from pipeline.manifest import Manifest, success_manifests
from pipeline.plan import Shard
from pipeline.storage import Store, get_json, in_parallel, open_store
from pipeline.verify.attack_models import ModelKind, with_embedded
from pipeline.verify.customizers import customizer
from pipeline.verify.edit_trial import EditTrial
from pipeline.verify.editors import EDITORS
from pipeline.verify.editors.base import Edit
from pipeline.verify.groups import DEFAULT_CLASS, Candidate
from pipeline.verify.purifiers import check_purifiers
from pipeline.verify.specimens import Specimens
from pipeline.verify.trial import Attack, Trial
from pipeline.verify.trials import Selection, shard_trials, squares
from protectors.model_files import ModelError, model_base_size, model_digest


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
    # Names everything that decides the numbers: settings, the attacker's model, the shards, the code.
    campaign_id: str
    attack: Attack
    source_url: str
    config_fp: str

    @property
    def prefix(self) -> str:
        """Where its results lie in the destination."""
        return f"verifications/{self.campaign_id}/"

    @property
    def limits(self) -> DecodeLimits:
        """What images are accepted."""
        return DecodeLimits(max_pixels=self.config.limits.max_pixels, min_side=self.config.limits.min_side)

    def destination(self) -> Store:
        """The protected archive."""
        return open_store(self.config.destination, storage_options(self.config.run.s3))

    def source(self) -> Store:
        """The archive it was made from."""
        return open_store(self.source_url, storage_options(self.config.run.s3))


def plan_campaign(config: VerifyConfig) -> tuple[Campaign, list[Target]]:
    """Checks every name, reads the manifests, and deals groups and images out to shards by hash.

    Raises:
        UserError: An attack or model is unknown, or nothing was ever protected here.
    """
    attack_settings = config.attack
    models = with_embedded(attack_settings.models)
    check_purifiers(attack_settings.purifiers, models)
    customizer(attack_settings.customizer, attack_settings.customizer_preset, attack_settings.customizer_overrides)
    if unknown := set(attack_settings.editors) - set(EDITORS):
        raise UserError(f"no editor named {min(unknown)!r}; `fixative attack list` shows what there is")
    if not attack_settings.groups and not attack_settings.edited:
        raise UserError("nothing to attack: ask for --groups or --edited images")
    try:
        folder = model_folder(models[ModelKind.LATENT])
        digest, side = model_digest(folder), model_base_size(folder)
    except ModelError as error:
        raise UserError(str(error)) from error
    destination = open_store(config.destination, storage_options(config.run.s3))
    manifests = [item for item in success_manifests(destination) if item.data is not None]
    if not manifests:
        raise UserError(f"{destination.url} holds no protected images")
    fields = {
        "attack": attack_settings.model_dump(mode="json"),
        "model": digest,
        "shards": [[item.shard_id, item.logical_sha256] for item in manifests],
        "code": code_version(),
    }
    campaign = Campaign(
        config=config,
        campaign_id=fingerprint(fields)[:16],
        attack=Attack(
            customizer=attack_settings.customizer,
            preset=attack_settings.customizer_preset,
            overrides=attack_settings.customizer_overrides,
            models=models,
            side=side,
            generated=attack_settings.generated,
            seed=attack_settings.seed,
        ),
        source_url=config.source or _source_of(manifests[0]),
        config_fp=manifests[0].config_fingerprint,
    )
    return campaign, _targets(campaign, destination, manifests)


def _source_of(manifest: Manifest) -> str:
    uri, key = manifest.source["uri"], manifest.source["key"]
    return str(uri).removesuffix(f"/{key}")


def _targets(campaign: Campaign, destination: Store, manifests: Sequence[Manifest]) -> list[Target]:
    """Deals groups and images out in rounds over the shards, in an order that their hashes decide."""
    settings = campaign.config.attack
    ranked = sorted(manifests, key=lambda item: sha256_hex(f"{settings.salt}|{item.shard_id}"))
    shares = {
        item.shard_id: [settings_count // len(ranked) + (place < settings_count % len(ranked))
                        for settings_count in (settings.groups, settings.edited)]
        for place, item in enumerate(ranked)
    }  # fmt: skip
    chosen = [item for item in ranked if any(shares[item.shard_id])]
    shards = in_parallel(partial(_shard, destination), chosen)
    return [
        Target(shard=shard, manifest=item, groups=shares[item.shard_id][0], edited=shares[item.shard_id][1])
        for shard, item in zip(shards, chosen, strict=True)
    ]


def _shard(destination: Store, manifest: Manifest) -> Shard:
    for item in destination.list("plans/plan-"):
        document = get_json(destination, item.key)
        for entry in document["shards"]:
            if entry["shard_id"] == manifest.shard_id:
                return Shard(**entry | {"rung": manifest.rung})
    raise IntegrityError(f"{destination.url}: no plan lists {manifest.shard_id}, which is committed")


def prepare_target(campaign: Campaign, target: Target) -> Iterator[Trial | EditTrial]:
    """Yields the trials of one shard that are not stored yet."""
    settings = campaign.config.attack
    specimens = Specimens(
        destination=campaign.destination(),
        source=campaign.source(),
        shard=target.shard,
        config_fp=campaign.config_fp,
        manifest=target.manifest,
        subject_column=settings.subject_column,
        class_column=settings.class_column,
    )
    prefix = f"{campaign.prefix}{target.shard.shard_id}/"
    stored = {item.key for item in campaign.destination().list(prefix)}
    selection = Selection(
        groups=target.groups,
        salt=settings.salt,
        side=campaign.attack.side,
        purifiers=settings.purifiers,
        limits=campaign.limits,
    )
    if target.groups:
        yield from shard_trials(specimens, selection, prefix, stored)
    ranked = sorted(specimens.candidates(), key=lambda item: sha256_hex(f"{settings.salt}|edit|{item.source_sha256}"))
    for candidate in ranked[: target.edited]:
        keys = {name: f"{prefix}{candidate.source_sha256[:12]}-{name}.json" for name in settings.editors}
        if missing := {name: key for name, key in keys.items() if key not in stored}:
            yield from _edit_trials(campaign, specimens, selection, candidate, missing)


def _edit_trials(
    campaign: Campaign, specimens: Specimens, selection: Selection, candidate: Candidate, missing: dict[str, str]
) -> Iterator[EditTrial]:
    wish = campaign.config.attack.edit_prompt
    word = candidate.class_word
    name = candidate.source_sha256
    clean = squares(specimens.originals([candidate]), selection)[name]
    protected = squares(specimens.protected([candidate]), selection)[name]
    for editor, key in missing.items():
        yield EditTrial(
            key=key,
            unit=candidate.asset_id,
            editor=editor,
            edit=Edit(
                target=wish if word is None else f"{wish} of a {word}", source=f"a photo of a {word or DEFAULT_CLASS}"
            ),
            clean=clean,
            protected=protected,
            purifiers=selection.purifiers,
            seed=asset_seed(name, str(campaign.attack.seed), editor),
        )
