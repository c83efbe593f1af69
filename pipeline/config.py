"""What a job is: the settings that decide its results, and those that only decide how it runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator

PIXEL_CODE_VERSION = 1
"""Raised whenever decoding, scaling or encoding changes a stored pixel; part of every fingerprint."""

MAX_EPS_LEVELS = 64
"""Beyond this nobody would call the change imperceptible; perturbations travel as int8."""

Resolution = Literal["training-scale", "native"]
OutputFormat = Literal["png", "webp", "jpeg"]
OtherImages = Literal["refuse", "drop", "keep"]
Precision = Literal["float32", "bfloat16"]
GateMetric = Literal["survival", "effect"]
GateAction = Literal["pass", "flag", "fail", "strengthen"]
DataMining = Literal[
    "none",
    "unspecified",
    "allowed",
    "prohibited",
    "prohibited-ai-training",
    "prohibited-generative-ai-training",
    "prohibited-except-search-indexing",
    "prohibited-see-constraint",
]
RightsText = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
RightsUrl = Annotated[str, StringConstraints(pattern=r"^https?://\S+$", max_length=1000)]
LocalFile = Annotated[str, AfterValidator(lambda path: str(Path(path).expanduser().absolute()))]
"""Absolute, since workers do not start in the folder of the command."""


def _lineage_url(url: str) -> str:
    if not re.fullmatch(r"(file:///[^\s]+|https?://[^\s@?/]+(/[^\s@?]*)?)", url):
        raise ValueError(
            "give file:///folder/events.jsonl or http(s)://host, without user, password or query; "
            "a key goes into OPENLINEAGE_API_KEY"
        )
    return url


LineageUrl = Annotated[str, AfterValidator(_lineage_url)]


class _Settings(BaseModel):
    # Docstrings below fields are their descriptions: Prefect's form for a run's parameters shows them.
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_by_name=True,
        serialize_by_alias=True,
        use_attribute_docstrings=True,
    )


class ArchiveSettings(_Settings):
    """How to read the source archive."""

    image_column: str | None = None
    """Parquet column that holds the image (HF struct {bytes, path}, or binary). Found by itself when there is one."""
    id_column: str | None = None
    """Parquet column with asset ids. Default: `asset_id` where there is one, else shard name and row number."""
    other_images: OtherImages = "refuse"
    """Further columns or tar files that hold pictures would go out unprotected: refuse the shard (for plain binary
    values: quarantine the row), drop them, or keep them (masks, say).
    """
    files_per_shard: Annotated[int, Field(ge=1, le=100_000)] = 512
    """Images in a folder or prefix are grouped into virtual shards of this many files."""
    unit_assets: Annotated[int, Field(ge=1, le=256)] = 16
    """Most images in one unit of work: what a crash can cost at most, and one part object in the store."""
    unit_bytes: Annotated[int, Field(ge=1)] = 10_000_000
    """Most source bytes in one unit; a unit with one image may be larger."""


class MethodSettings(_Settings):
    """Which protection, how strong, on which model."""

    name: str = "photoguard"
    """A registered method (`fixative methods`), or "module:Class" of another package."""
    preset: str = "fast"
    """paper: the publication's numbers; fast: CPU and demo; strong: more steps."""
    eps: Annotated[float | None, Field(gt=0, le=MAX_EPS_LEVELS)] = None
    """Budget in 8-bit levels of the saved pixels (l_inf). None: the preset's."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Single fields of the method's configuration that replace the preset's."""
    model: str | None = None
    """An embedded model (a laboratory), a diffusers folder, or a hub id; of the kind that the method attacks. None: the
    embedded one of that kind (nano-sd; nano-ddpm for methods against pixel-space purifiers).
    """
    precision: Precision = "float32"
    """Number format of the model's weights on the device; images and perturbations stay float32."""
    prompt: str | None = None
    """Caption used for every image by methods that condition on text. None: the method's own."""
    subject_column: str | None = None
    """Column that names the subject of an image. Methods that train a surrogate (aspl, fsmg, simac, metacloak;
    anti_diffusion with share=group) then train one per subject, on those of its images that have one shape and lie in
    one unit; rows without a subject, and shards without the column, one per image. Sort the archive by it and let
    `archive.unit_assets` and `unit_bytes` hold the largest subject: in Parquet shards units are then cut between
    subjects (a row group always ends one). Groups become smaller where memory runs out (halved), where a worker died on
    one (its images go single), and where the decoded images of a unit exceed 256 MB (those beyond go single).
    """


class OutputSettings(_Settings):
    """How protected pixels are stored."""

    format: OutputFormat = "png"
    """png and webp are lossless; jpeg (quality 95, 4:4:4) loses some protection, and the loss is measured."""
    resolution: Resolution = "training-scale"
    """training-scale: optimize at the model's size and upsample the perturbation; native: tiles at full size."""


class GateSettings(_Settings):
    """Decides on the sampled check whether a shard may be committed."""

    metric: GateMetric = "survival"
    """survival: share of the objective's gain that is left; effect: share of what a customized model gains on clean
    images that it does not gain on protected ones (needs ``groups``). Either after the worst purifier.
    """
    purifiers: tuple[str, ...] = ()
    """Purifiers that count. Empty: all of the check."""
    threshold: Annotated[float, Field(ge=-1, le=1)] = 0.5
    """A shard below it is not good enough."""
    action: GateAction = "pass"
    """pass: commit whatever is measured; flag: commit and say so; fail: do not commit; strengthen: protect the shard
    again with the next preset of the ladder.
    """
    ladder: tuple[str, ...] = ()
    """Presets that strengthen tries, one after the other; all of the job's method."""
    finally_: Annotated[Literal["flag", "fail"], Field(alias="finally")] = "fail"
    """What becomes of a shard that the last preset of the ladder does not save."""
    unmeasured: Literal["pass", "flag", "fail"] = "flag"
    """What becomes of a shard that cannot be measured: too few images for groups, or nothing gained that could survive.
    """

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (self.action == "strengthen") != bool(self.ladder):
            raise ValueError("action 'strengthen' and a ladder of presets go together: give both or none")
        return self


class CheckSettings(_Settings):
    """The sampled check of every shard before it is committed."""

    fraction: Annotated[float, Field(ge=0, le=1)] = 0.02
    """Share of assets that is checked, chosen by hash of the asset id."""
    min_per_shard: Annotated[int, Field(ge=0)] = 2
    """At least this many assets per shard, however small it is."""
    salt: str = ""
    """Changes which assets are chosen."""
    purifiers: Annotated[tuple[str, ...], Field(min_length=1)] = ("jpeg75", "half-size", "chain")
    """Purifiers of the check (`fixative attack list`); those that need a model run at its training scale only."""
    groups: Annotated[int, Field(ge=0)] = 0
    """Groups of images per shard on which an attacker's model is customized, four cells each: minutes per group."""
    customizer: str = "dreambooth"
    """How it is customized (`fixative attack list`)."""
    customizer_preset: str = "quick"
    """Preset of the customizer (`fixative attack list`)."""
    customizer_overrides: dict[str, Any] = Field(default_factory=dict)
    """Single settings of the customizer in place of its preset's."""
    customize_after: tuple[str, ...] = ("chain",)
    """Purifiers of the customization beside none; each costs two more customizations per group."""
    subject_column: str | None = None
    """Column that names the subject of an image. None: groups are look-alikes."""
    class_column: str | None = None
    """Column that names its class ("dog"). None: "subject"."""
    models: dict[str, str] = Field(default_factory=dict)
    """The attacker's checkpoints by kind (latent, pixel, upscaler, ...): folders or hub ids. The job's own model and
    the embedded ones are there without.
    """
    gate: GateSettings = GateSettings()
    """Which shards may be committed."""

    @model_validator(mode="after")
    def _gate_has_its_metric(self) -> Self:
        if self.gate.action != "pass" and self.gate.metric == "effect" and self.groups < 3:
            raise ValueError("the gate's metric 'effect' needs groups of at least 3: it is a mean over groups")
        measured = self.purifiers if self.gate.metric == "survival" else self.customize_after
        if unknown := sorted(set(self.gate.purifiers) - set(measured)):
            raise ValueError(f"the gate counts {', '.join(unknown)}, which its check does not measure")
        if self.gate.action != "pass" and not self.min_per_shard:
            raise ValueError("a gate needs min_per_shard of at least 1: it cannot judge a shard that is not checked")
        return self


class SignerSettings(_Settings):
    """Who signs the Content Credentials (C2PA) of every image; nobody, without a certificate.

    Both files must lie on every machine that stores images. The key is read there and goes nowhere else.
    """

    certificate: LocalFile | None = None
    """PEM file: the signer's certificate, then those that vouch for it."""
    key: LocalFile | None = None
    """PEM file with its private key (PKCS#8), without a password."""
    callback: Annotated[str | None, Field(pattern=r"^[\w.]+:\w+$")] = None
    """Instead of a key, "module:function" that returns the signature of the bytes it gets: a KMS or an HSM. The module
    must be installed on those machines.
    """
    timestamp_url: RightsUrl | None = None
    """Time-stamp authority (RFC 3161), asked once per image. None: no request leaves the machine."""

    @model_validator(mode="after")
    def _certificate_has_its_key(self) -> Self:
        given = [self.key is not None, self.callback is not None]
        if sum(given) != (self.certificate is not None):
            raise ValueError("a signer is a certificate with either a key or a callback")
        if self.timestamp_url and not self.certificate:
            raise ValueError("timestamp_url needs a certificate")
        return self


class ProvenanceSettings(_Settings):
    """What every stored image says of its rights (XMP), each where the image itself says nothing of that kind."""

    data_mining: DataMining = "prohibited-ai-training"
    """plus:DataMining, a reservation that crawlers can read. The default says no more than the job itself: not for AI
    training. Images under a Creative Commons licence, or marked as public domain, get none. none: never written.
    """
    constraint: RightsText | None = None
    """What prohibited-see-constraint refers to."""
    creator: RightsText | None = None
    """Who made the images; like the notice, only where no EXIF names one."""
    copyright_notice: RightsText | None = None
    """Such as "© 2026 Example Ltd."."""
    credit: RightsText | None = None
    """Whom to name when an image is published."""
    usage_terms: RightsText | None = None
    """How the images may be used, for people to read."""
    web_statement: RightsUrl | None = None
    """Page with the licence."""
    licensor_url: RightsUrl | None = None
    """Page where a licence is sold."""
    signer: SignerSettings = SignerSettings()

    @model_validator(mode="after")
    def _constraint_is_referred_to(self) -> Self:
        if (self.data_mining == "prohibited-see-constraint") != (self.constraint is not None):
            raise ValueError("data_mining 'prohibited-see-constraint' and a constraint go together: give both or none")
        return self


class LimitSettings(_Settings):
    """When an image is refused and when a job is."""

    max_pixels: Annotated[int, Field(ge=1)] = 200_000_000
    """Pixels per image; larger ones are quarantined before they are decoded (decompression bombs)."""
    min_side: Annotated[int, Field(ge=7)] = 16
    """Shortest side in pixels that can be protected."""


class JobSettings(_Settings):
    """Everything that decides the results of a job: with equal weights, device and library versions, equal pixels."""

    archive: ArchiveSettings = ArchiveSettings()
    """How to read the source archive."""
    method: MethodSettings = MethodSettings()
    """Which protection, how strong, on which model."""
    output: OutputSettings = OutputSettings()
    """How protected pixels are stored."""
    check: CheckSettings = CheckSettings()
    """The sampled check of every shard before it is committed."""
    limits: LimitSettings = LimitSettings()
    """When an image is refused."""
    provenance: ProvenanceSettings = ProvenanceSettings()
    """What every stored image says of its rights, and who signs it."""
    seed: int = 0
    """Base seed; every image's own seed follows from this, the configuration and the image's bytes."""


class S3Settings(_Settings):
    """How to reach S3. Credentials come from the environment, the profile or the machine's role, never from here."""

    endpoint_url: str | None = None
    """URL of an S3 service other than AWS, without credentials."""
    region: str | None = None
    """Region."""
    profile: str | None = None
    """Section of ~/.aws/config on the machine that runs the job; None: the usual variables or the machine's role."""


class RunSettings(_Settings):
    """How a job runs. On the CPU only ``threads`` and ``batch_size`` can change how a float is rounded."""

    actors: Annotated[int | None, Field(ge=1)] = None
    """Number of optimizer actors. None: one per GPU of the cluster, or one per CPU core."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """cuda, cpu, or auto: cuda where the cluster has GPUs."""
    threads: Annotated[int, Field(ge=1)] = 1
    """Threads of one CPU actor. Another number may round floats differently, so keep it for one destination."""
    batch_size: Annotated[int | None, Field(ge=1)] = None
    """Images per forward pass. None: 1 on the CPU, 8 on a GPU; halved by itself when memory runs out."""
    ray_address: str | None = None
    """Address of a running Ray cluster ("auto", "ray://..."); None starts one here for the run."""
    wave_units: Annotated[int, Field(ge=1, le=50_000)] = 5_000
    """Units handed to Ray at a time; shards are committed between waves."""
    single_writer: bool = False
    """The store cannot refuse a second writer, and you promise that there is none."""
    max_quarantine_fraction: Annotated[float, Field(ge=0, le=1)] = 0.001
    """The run fails (its results stay) when more than this share of assets is quarantined, and more than
    max_quarantine_rows.
    """
    max_quarantine_rows: Annotated[int, Field(ge=0)] = 5
    """Up to this many quarantined assets are always tolerated."""
    max_deaths: Annotated[int, Field(ge=1)] = 20
    """Deaths of workers in one run after which the machine counts as ill."""
    lineage: LineageUrl | None = None
    """Where OpenLineage events go: file:///folder/events.jsonl, or http(s)://host (OPENLINEAGE_API_KEY is sent).
    None: where OPENLINEAGE_URL or the other variables of OpenLineage say; nowhere without them.
    """
    pictures: Annotated[int, Field(ge=0, le=16)] = 4
    """Protected images that the run's page in Prefect shows, small, with what was changed in them; 0: none. Prefect's
    database may be a hosted one. Originals never get there.
    """
    s3: S3Settings = S3Settings()
    """How to reach S3."""


class AttackSettings(_Settings):
    """What `fixative verify` tries on a protected archive. Everything that decides its numbers."""

    groups: Annotated[int, Field(ge=0)] = 10
    """Groups of images that models are customized on, over all shards; 0: none."""
    customizer: str = "dreambooth"
    """How models are customized (`fixative attack list`)."""
    customizer_preset: str = "quick"
    """Preset of the customizer (`fixative attack list`)."""
    customizer_overrides: dict[str, Any] = Field(default_factory=dict)
    """Single settings of the customizer in place of its preset's, e.g. {"steps": 400}."""
    generated: Annotated[int, Field(ge=1)] = 8
    """Images drawn from each customized model."""
    edited: Annotated[int, Field(ge=0)] = 4
    """Single images that are edited, over all shards, with each of the editors."""
    editors: tuple[str, ...] = ("sdedit-0.5-quick",)
    """Which editors (`fixative attack list`)."""
    edit_prompt: str = "a painting"
    """What the editor is told to make of an image."""
    purifiers: tuple[str, ...] = ("chain",)
    """Beside none; every one costs two customizations per group and two edits per image."""
    subject_column: str | None = None
    """Column that names the subject of an image. None: groups are look-alikes."""
    class_column: str | None = None
    """Column that names its class ("dog"). None: "subject"."""
    models: dict[str, str] = Field(default_factory=dict)
    """The attacker's checkpoints by kind (latent, pixel, upscaler, ...): folders or hub ids; else the embedded ones."""
    metrics: dict[str, str] = Field(default_factory=dict)
    """Metrics beside those that need no weights: a folder by name (dino, clip, lpips), or "installed" (faces)."""
    salt: str = ""
    """Changes which groups and images are chosen."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Base seed of the attacks."""


class VerifyConfig(_Settings):
    """One verification of a protected archive: which, with what, how."""

    destination: str
    """Folder or s3:// prefix that holds the results."""
    source: str | None = None
    """The archive it was made from. None: where the manifests say."""
    attack: AttackSettings = AttackSettings()
    """What is tried."""
    run: RunSettings = RunSettings()
    """How it runs."""


class JobConfig(_Settings):
    """One protection job: from where, to where, what, how."""

    source: str
    """Folder, prefix or file with the archive: images, Parquet, tars. Any fsspec URL, without credentials."""
    destination: str
    """Folder or s3:// prefix for the results; bound to the settings under `job` by its first run."""
    job: JobSettings = JobSettings()
    """Decides the results. Another value needs another destination."""
    run: RunSettings = RunSettings()
    """How it runs; may change from run to run."""
