"""What a job is: the settings that decide its results, and those that only decide how it runs."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

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


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_by_name=True, serialize_by_alias=True)


class ArchiveSettings(_Settings):
    """How to read the source archive."""

    # Parquet column that holds the image (HF struct {bytes, path}, or binary). Found by itself when there is one.
    image_column: str | None = None
    # Parquet column with asset ids. Default: `asset_id` where there is one, else shard name and row number.
    id_column: str | None = None
    # Further columns or tar files that hold pictures would go out unprotected: refuse the shard (for plain binary
    # values: quarantine the row), drop them, or keep them (masks, say).
    other_images: OtherImages = "refuse"
    # Images in a folder or prefix are grouped into virtual shards of this many files.
    files_per_shard: Annotated[int, Field(ge=1, le=100_000)] = 512
    # Most images in one unit of work: what a crash can cost at most, and one part object in the store.
    unit_assets: Annotated[int, Field(ge=1, le=256)] = 16
    # Most source bytes in one unit; a unit with one image may be larger.
    unit_bytes: Annotated[int, Field(ge=1)] = 10_000_000


class MethodSettings(_Settings):
    """Which protection, how strong, on which model."""

    # A registered method (`fixative methods`), or "module:Class" of another package.
    name: str = "photoguard"
    # paper: the publication's numbers; fast: CPU and demo; strong: more steps.
    preset: str = "fast"
    # Budget in 8-bit levels of the saved pixels (l_inf). None: the preset's.
    eps: Annotated[float | None, Field(gt=0, le=MAX_EPS_LEVELS)] = None
    # Single fields of the method's configuration that replace the preset's.
    overrides: dict[str, Any] = Field(default_factory=dict)
    # An embedded model (a laboratory), a diffusers folder, or a hub id; of the kind that the method attacks.
    # None: the embedded one of that kind (nano-sd; nano-ddpm for methods against pixel-space purifiers).
    model: str | None = None
    # Number format of the model's weights on the device; images and perturbations stay float32.
    precision: Precision = "float32"
    # Caption used for every image by methods that condition on text. None: the method's own.
    prompt: str | None = None
    # Column that names the subject of an image. Methods that train a surrogate (aspl, fsmg, simac, metacloak;
    # anti_diffusion with share=group) then train one per subject, on those of its images that have one shape and lie
    # in one unit; rows without a subject, and shards without the column, one per image. Sort the archive by it and let
    # `archive.unit_assets` and `unit_bytes` hold the largest subject: in Parquet shards units are then cut between
    # subjects (a row group always ends one). Groups become smaller where memory runs out (halved), where a worker died
    # on one (its images go single), and where the decoded images of a unit exceed 256 MB (those beyond go single).
    subject_column: str | None = None


class OutputSettings(_Settings):
    """How protected pixels are stored."""

    # png and webp are lossless; jpeg (quality 95, 4:4:4) loses some protection, and the loss is measured.
    format: OutputFormat = "png"
    # training-scale: optimize at the model's size and upsample the perturbation; native: tiles at full size.
    resolution: Resolution = "training-scale"


class GateSettings(_Settings):
    """Decides on the sampled check whether a shard may be committed."""

    # survival: share of the objective's gain that is left; effect: share of what a customized model gains on clean
    # images that it does not gain on protected ones (needs ``groups``). Either after the worst purifier.
    metric: GateMetric = "survival"
    # Purifiers that count. Empty: all of the check.
    purifiers: tuple[str, ...] = ()
    # A shard below it is not good enough.
    threshold: Annotated[float, Field(ge=-1, le=1)] = 0.5
    # pass: commit whatever is measured; flag: commit and say so; fail: do not commit;
    # strengthen: protect the shard again with the next preset of the ladder.
    action: GateAction = "pass"
    # Presets that strengthen tries, one after the other; all of the job's method.
    ladder: tuple[str, ...] = ()
    # What becomes of a shard that the last preset of the ladder does not save.
    finally_: Annotated[Literal["flag", "fail"], Field(alias="finally")] = "fail"
    # What becomes of a shard that cannot be measured: too few images for groups, or nothing gained that could survive.
    unmeasured: Literal["pass", "flag", "fail"] = "flag"

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (self.action == "strengthen") != bool(self.ladder):
            raise ValueError("action 'strengthen' and a ladder of presets go together: give both or none")
        return self


class CheckSettings(_Settings):
    """The sampled check of every shard before it is committed."""

    # Share of assets that is checked, chosen by hash of the asset id.
    fraction: Annotated[float, Field(ge=0, le=1)] = 0.02
    # At least this many assets per shard, however small it is.
    min_per_shard: Annotated[int, Field(ge=0)] = 2
    # Changes which assets are chosen.
    salt: str = ""
    # Purifiers of the check (`fixative attack list`); those that need a model run at its training scale only.
    purifiers: Annotated[tuple[str, ...], Field(min_length=1)] = ("jpeg75", "half-size", "chain")
    # Groups of images per shard on which an attacker's model is customized, four cells each: minutes per group.
    groups: Annotated[int, Field(ge=0)] = 0
    # How it is customized (`fixative attack list`), and with which preset.
    customizer: str = "dreambooth"
    customizer_preset: str = "quick"
    # Single settings of the customizer in place of its preset's.
    customizer_overrides: dict[str, Any] = Field(default_factory=dict)
    # Purifiers of the customization beside none; each costs two more customizations per group.
    customize_after: tuple[str, ...] = ("chain",)
    # Columns that name the subject and its class ("dog"). Without them groups are look-alikes, of class "subject".
    subject_column: str | None = None
    class_column: str | None = None
    # The attacker's checkpoints by kind (latent, pixel, upscaler, ...): folders or hub ids. The job's own model and
    # the embedded ones are there without.
    models: dict[str, str] = Field(default_factory=dict)
    gate: GateSettings = GateSettings()

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


class LimitSettings(_Settings):
    """When an image is refused and when a job is."""

    # Pixels per image; larger ones are quarantined before they are decoded (decompression bombs).
    max_pixels: Annotated[int, Field(ge=1)] = 200_000_000
    # Shortest side in pixels that can be protected.
    min_side: Annotated[int, Field(ge=7)] = 16


class JobSettings(_Settings):
    """Everything that decides the results of a job: with equal weights, device and library versions, equal pixels."""

    archive: ArchiveSettings = ArchiveSettings()
    method: MethodSettings = MethodSettings()
    output: OutputSettings = OutputSettings()
    check: CheckSettings = CheckSettings()
    limits: LimitSettings = LimitSettings()
    # Base seed; every image's own seed follows from this, the configuration and the image's bytes.
    seed: int = 0


class S3Settings(_Settings):
    """How to reach S3. Credentials come from the environment, the profile or the machine's role, never from here."""

    endpoint_url: str | None = None
    region: str | None = None
    profile: str | None = None


class RunSettings(_Settings):
    """How a job runs. On the CPU only ``threads`` and ``batch_size`` can change how a float is rounded."""

    # Number of optimizer actors. None: one per GPU of the cluster, or one per CPU core.
    actors: Annotated[int | None, Field(ge=1)] = None
    # cuda, cpu, or auto: cuda where the cluster has GPUs.
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # Threads of one CPU actor. Another number may round floats differently, so keep it for one destination.
    threads: Annotated[int, Field(ge=1)] = 1
    # Images per forward pass. None: 1 on the CPU, 8 on a GPU; halved by itself when memory runs out.
    batch_size: Annotated[int | None, Field(ge=1)] = None
    # Address of a running Ray cluster ("auto", "ray://..."); None starts one here for the run.
    ray_address: str | None = None
    # Units handed to Ray at a time; shards are committed between waves.
    wave_units: Annotated[int, Field(ge=1, le=50_000)] = 5_000
    # The store cannot refuse a second writer, and you promise that there is none.
    single_writer: bool = False
    # The run fails (its results stay) when more than this share of assets, and more than these rows, is quarantined.
    max_quarantine_fraction: Annotated[float, Field(ge=0, le=1)] = 0.001
    max_quarantine_rows: Annotated[int, Field(ge=0)] = 5
    # Deaths of workers in one run after which the machine counts as ill.
    max_deaths: Annotated[int, Field(ge=1)] = 20
    s3: S3Settings = S3Settings()


class AttackSettings(_Settings):
    """What `fixative verify` tries on a protected archive. Everything that decides its numbers."""

    # Groups of images that models are customized on, over all shards; 0: none.
    groups: Annotated[int, Field(ge=0)] = 10
    customizer: str = "dreambooth"
    customizer_preset: str = "quick"
    # Single settings of the customizer in place of its preset's, e.g. {"steps": 400}.
    customizer_overrides: dict[str, Any] = Field(default_factory=dict)
    # Images drawn from each customized model.
    generated: Annotated[int, Field(ge=1)] = 8
    # Single images that are edited, over all shards, with each of the editors.
    edited: Annotated[int, Field(ge=0)] = 4
    editors: tuple[str, ...] = ("sdedit-0.5-quick",)
    # What the editor is told to make of an image.
    edit_prompt: str = "a painting"
    # Beside none; every one costs two customizations per group and two edits per image.
    purifiers: tuple[str, ...] = ("chain",)
    subject_column: str | None = None
    class_column: str | None = None
    # The attacker's checkpoints by kind (latent, pixel, upscaler, ...): folders or hub ids; else the embedded ones.
    models: dict[str, str] = Field(default_factory=dict)
    # Metrics beside those that need no weights: a folder by name (dino, clip, lpips), or "installed" (faces).
    metrics: dict[str, str] = Field(default_factory=dict)
    # Changes which groups and images are chosen.
    salt: str = ""
    seed: Annotated[int, Field(ge=0)] = 0


class VerifyConfig(_Settings):
    """One verification of a protected archive: which, with what, how."""

    destination: str
    # The archive it was made from. None: where the manifests say.
    source: str | None = None
    attack: AttackSettings = AttackSettings()
    run: RunSettings = RunSettings()


class JobConfig(_Settings):
    """One protection job: from where, to where, what, how."""

    source: str
    destination: str
    job: JobSettings = JobSettings()
    run: RunSettings = RunSettings()
