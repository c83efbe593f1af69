"""A resolved job: what the configuration means on this installation, in the form in which workers get it."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

from pipeline.config import MAX_EPS_LEVELS, PIXEL_CODE_VERSION, CheckSettings, JobConfig, S3Settings
from pipeline.decode import DecodeLimits
from pipeline.errors import UserError
from pipeline.ids import fingerprint
from pipeline.provenance.signer import provenance_fields
from pipeline.shard_index import kind_of
from pipeline.storage import StorageOptions, Store, open_store
from protectors.base import ImageProtector
from protectors.config import ProtectorConfig
from protectors.loading import model_source
from protectors.model_files import ModelError, model_digest, resolve_folder
from protectors.reference import PINNED, ReferenceModelError, reference_path, verify_reference
from protectors.registry import UnknownProtector, protector_class

MODEL_FREE_SIDE = 512  # training scale of methods that use no model
NO_MODEL = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Everything that a worker needs. Plain data: it is sent to every process of the run."""

    config: JobConfig
    # What decides the results, as the binding stores it; ``config_fp`` is its fingerprint.
    fields: dict[str, Any]
    config_fp: str
    run_id: str
    # The method's configuration on every rung of the ladder: the job's preset first, then those of its gate.
    ladder: tuple[dict[str, Any], ...]
    protector_version: str
    # The model that the method attacks, or NO_MODEL: its name as the job or the method's kind gives it, ...
    model: str
    # ... what it is as an attacker's checkpoint ("latent", "pixel"), and the digest of its files.
    model_kind: str
    model_digest: str
    # Training scale: side in pixels to which images are brought for the model.
    base_size: int

    def eps_levels(self, rung: int) -> float:
        """The l_inf budget in 8-bit levels of the saved pixels."""
        return float(self.ladder[rung]["eps_levels"])

    @property
    def limits(self) -> DecodeLimits:
        """What images are accepted."""
        limits = self.config.job.limits
        return DecodeLimits(max_pixels=limits.max_pixels, min_side=limits.min_side)

    def source(self) -> Store:
        """The archive, or the folder of a single shard (``source_key``)."""
        return archive_store(self.config.source, self.config.run.s3)[0]

    @property
    def source_key(self) -> str:
        """The one object or folder within ``source`` that is the archive; "" for all of it."""
        return archive_store(self.config.source, self.config.run.s3)[1]

    def destination(self) -> Store:
        """Where results go."""
        return destination_store(self.config)


def archive_store(source: str, s3: S3Settings) -> tuple[Store, str]:
    """The store of a source; and the key of the one shard within it, "" where the source is a folder or prefix."""
    root, slash, name = source.rstrip("/").rpartition("/")
    url, key = (root or slash or ".", name) if kind_of(name) else (source, "")
    return open_store(url, storage_options(s3)), key


def destination_store(config: JobConfig) -> Store:
    """The store of the results."""
    return open_store(config.destination, storage_options(config.run.s3), single_writer=config.run.single_writer)


def storage_options(s3: S3Settings) -> StorageOptions:
    """S3 settings in the form that stores take."""
    return StorageOptions(endpoint_url=s3.endpoint_url, region=s3.region, profile=s3.profile)


def resolve(config: JobConfig) -> Job:
    """Finds method and model, applies presets, and names everything that decides the results.

    Raises:
        UserError: unknown method or preset, a value that cannot work, or a folder that is no model.
    """
    method = config.job.method
    chosen, settings = protector_settings(config)
    gate = config.job.check.gate
    ladder = [settings, *(protector_settings(config, preset)[1] for preset in gate.ladder)]
    if len({fingerprint(rung.to_dict()) for rung in ladder}) < len(ladder):
        raise UserError("two rungs of the gate's ladder are equal: name stronger presets, and no eps that levels them")
    check_attacks(config.job.check)
    model = find_model(config)
    digest = model_digest(model.folder) if model.folder else NO_MODEL
    fields = {
        "method": {"name": method.name, "version": chosen.version, "config": settings.to_dict()},
        "model": digest,
        "prompt": method.prompt,
        "subject_column": method.subject_column,
        "precision": method.precision,
        "archive": config.job.archive.model_dump(),
        "output": config.job.output.model_dump(),
        "check": config.job.check.model_dump(mode="json"),
        "ladder": [rung.to_dict() for rung in ladder[1:]],
        "limits": config.job.limits.model_dump(),
        "provenance": provenance_fields(config.job.provenance),
        "seed": config.job.seed,
        "pixel_code": PIXEL_CODE_VERSION,
    }
    return Job(
        config=config,
        fields=fields,
        config_fp=fingerprint(fields),
        run_id=uuid.uuid4().hex[:12],
        ladder=tuple(rung.to_dict() for rung in ladder),
        protector_version=chosen.version,
        model=model.name,
        model_kind=model.kind,
        model_digest=digest,
        base_size=model.base_size,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundModel:
    """The model of a job's method, or the absence of one."""

    name: str = NO_MODEL
    kind: str = NO_MODEL
    # On this machine; "" where there is none.
    folder: str = ""
    base_size: int = MODEL_FREE_SIDE


def find_model(config: JobConfig) -> FoundModel:
    """The model that the job names or, if it names none, the embedded one of the kind that its method attacks.

    Raises:
        UserError: The method is unknown, there is no such model, or the folder holds none of that kind.
    """
    method, chosen = config.job.method, protector_settings(config)[0]
    if not chosen.needs_model():
        return FoundModel()
    try:
        source = model_source(chosen)
        name = method.model or source.embedded
        if name is None:
            raise ModelError(f"it attacks {source.form} models and none is embedded; name a folder with --model")
        folder = model_folder(name)
        return FoundModel(name=name, kind=source.kind, folder=folder, base_size=source.training_scale(folder))
    except (ModelError, ReferenceModelError) as error:
        raise UserError(f"method '{method.name}': {error}") from error


def check_attacks(check: CheckSettings) -> None:
    """Finds unknown names among the check's purifiers, customizer and models before anything is protected.

    Raises:
        UserError: A name is unknown, or a purifier needs a checkpoint that is not given.
    """
    from pipeline.verify.attack_models import with_embedded
    from pipeline.verify.customizers import customizer
    from pipeline.verify.purifiers import check_purifiers

    models = with_embedded(check.models)
    check_purifiers([*check.purifiers, *check.customize_after], models)
    customizer(check.customizer, check.customizer_preset, check.customizer_overrides)
    for name in check.models.values():
        try:
            model_folder(name)
        except (ModelError, ReferenceModelError) as error:
            raise UserError(str(error)) from error


def protector_settings(
    config: JobConfig, preset: str | None = None
) -> tuple[type[ImageProtector[Any, Any]], ProtectorConfig]:
    """The method's class and its configuration: the job's preset or another one, with the job's changes.

    Raises:
        UserError: Unknown method, preset or field, or a value that cannot work.
    """
    method = config.job.method
    try:
        chosen = protector_class(method.name)
    except UnknownProtector as error:
        raise UserError(str(error)) from error
    name = preset or method.preset
    if name not in chosen.presets:
        raise UserError(f"method '{method.name}' has no preset '{name}'; it has {', '.join(sorted(chosen.presets))}")
    changes = dict(method.overrides)
    if method.eps is not None:
        changes["eps_levels"] = float(method.eps)
    try:
        settings = chosen.presets[name].replace(**changes)
    except ValueError as error:
        raise UserError(f"method '{method.name}': {error}") from error
    if settings.eps_levels > MAX_EPS_LEVELS:
        raise UserError(f"method '{method.name}': eps_levels={settings.eps_levels:g}: use at most {MAX_EPS_LEVELS}")
    return chosen, settings


def model_folder(name: str) -> str:
    """The model's folder on this machine: an embedded model by name, a folder, or the snapshot of a hub id.

    Raises:
        ModelError: There is none.
        ReferenceModelError: The embedded model is damaged.
    """
    if name in PINNED:
        verify_reference(name)
        return str(reference_path(name))
    return str(resolve_folder(name))


def code_version() -> str:
    """The installed version of Fixative, for provenance."""
    from importlib.metadata import version

    return version("fixative")
