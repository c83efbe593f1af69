"""The ``fixative`` command."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from flows import attack, compare, export, measure, models, protect_model_command, serve, show, verify_model
from flows.options import (
    ARCHIVE,
    METHOD,
    OUTPUT,
    RUN,
    Certificate,
    Key,
    Lineage,
    Metrics,
    Mining,
    S3Endpoint,
    S3Profile,
    S3Region,
    SingleWriter,
    SubjectColumn,
    Trust,
    metrics_asked,
    option,
)
from flows.settings import job_config, overrides_of, settings
from pipeline.config import JobConfig, S3Settings, VerifyConfig
from pipeline.errors import PipelineError, UserError
from pipeline.run import preflight
from protectors.model_files import ModelError
from protectors.reference import ReferenceModelError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Protects whole image archives against misuse by diffusion models.\n\n"
        "Start with [bold]fixative demo[/bold]. Exit codes: 0 every asset is protected or tolerably quarantined; "
        "1 the run ended with problems, what is done stays and a rerun goes on; 2 the command cannot run as given; "
        "130 or 143 interrupted, run the same command to go on."
    ),
)
app.add_typer(models.app, name="models")
app.add_typer(attack.app, name="attack")
app.add_typer(compare.app)
app.add_typer(export.app)
app.add_typer(measure.app)
app.add_typer(protect_model_command.app)
app.add_typer(serve.app)
app.add_typer(verify_model.app)
console = show.terminal()
errors = Console(stderr=True)

Source = Annotated[str | None, typer.Argument(help="Folder, prefix or file: images, Parquet, tars. Any fsspec URL.")]
Destination = Annotated[str | None, typer.Argument(help="Folder or s3:// prefix for the results.")]
Finished = Annotated[str, typer.Argument(help="Folder or s3:// prefix that holds results.")]


@app.command()
def protect(
    source: Source = None,
    destination: Destination = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="Job file (YAML). Options given here win over it.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and an estimate, write nothing.")] = False,
    image_column: Annotated[
        str | None,
        option("--image-column", panel=ARCHIVE, help="Parquet column with the images, if there are several."),
    ] = None,
    id_column: Annotated[
        str | None, option("--id-column", panel=ARCHIVE, help="Parquet column with asset ids. [default: asset_id]")
    ] = None,
    other_images: Annotated[
        str | None,
        option("--other-images", panel=ARCHIVE, help="Other pictures of a row: refuse, drop, keep. [default: refuse]"),
    ] = None,
    method: Annotated[
        str | None, option("--method", panel=METHOD, help="See `fixative methods`. [default: photoguard]")
    ] = None,
    preset: Annotated[
        str | None, option("--preset", panel=METHOD, help="paper, fast or strong. [default: fast]")
    ] = None,
    eps: Annotated[
        float | None,
        option("--eps", panel=METHOD, help="Budget in 8-bit levels. [default: the preset's]"),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", rich_help_panel=METHOD, help="Another field of the method, as name=value; repeatable."),
    ] = None,
    model: Annotated[
        str | None,
        option("--model", panel=METHOD, help="Diffusers folder or hub id. [default: an embedded one, a laboratory]"),
    ] = None,
    precision: Annotated[
        str | None, option("--precision", panel=METHOD, help="float32 or bfloat16 networks. [default: float32]")
    ] = None,
    prompt: Annotated[str | None, option("--prompt", panel=METHOD, help="Caption for methods that use one.")] = None,
    subject_column: SubjectColumn = None,
    seed: Annotated[int | None, option("--seed", panel=METHOD, help="Base seed. [default: 0]")] = None,
    format: Annotated[
        str | None, option("--format", panel=OUTPUT, help="png or webp (lossless), or jpeg. [default: png]")
    ] = None,
    resolution: Annotated[
        str | None, option("--resolution", panel=OUTPUT, help="training-scale or native. [default: training-scale]")
    ] = None,
    check_fraction: Annotated[
        float | None, option("--check-fraction", panel=OUTPUT, help="Share of assets that is checked. [default: 0.02]")
    ] = None,
    data_mining: Mining = None,
    certificate: Certificate = None,
    key: Key = None,
    actors: Annotated[
        int | None, option("--actors", panel=RUN, help="Optimizer actors. [default: one per GPU, or per CPU core]")
    ] = None,
    device: Annotated[str | None, option("--device", panel=RUN, help="auto, cpu or cuda. [default: auto]")] = None,
    ray_address: Annotated[
        str | None, option("--ray-address", panel=RUN, help="A running Ray cluster; else one starts here for the run.")
    ] = None,
    lineage: Lineage = None,
    single_writer: SingleWriter = None,
    s3_endpoint: S3Endpoint = None,
    s3_region: S3Region = None,
    s3_profile: S3Profile = None,
) -> None:
    """Protect an archive; run it again to go on after a stop.

    Results are committed shard by shard. A finished destination costs nothing to run again.

    Example: fixative protect s3://stock/2026 s3://stock-protected/2026 --method advdm --model ./stable-diffusion-v1-5
    """
    given = {
        "source": source,
        "destination": destination,
        "job.archive.image_column": image_column,
        "job.archive.id_column": id_column,
        "job.archive.other_images": other_images,
        "job.method.name": method,
        "job.method.preset": preset,
        "job.method.eps": eps,
        "job.method.overrides": overrides_of(overrides),
        "job.method.model": model,
        "job.method.precision": precision,
        "job.method.prompt": prompt,
        "job.method.subject_column": subject_column,
        "job.seed": seed,
        "job.output.format": format,
        "job.output.resolution": resolution,
        "job.check.fraction": check_fraction,
        "job.provenance.data_mining": data_mining,
        "job.provenance.signer.certificate": certificate,
        "job.provenance.signer.key": key,
        "run.actors": actors,
        "run.device": device,
        "run.ray_address": ray_address,
        "run.lineage": lineage,
        "run.single_writer": single_writer,
        "run.s3.endpoint_url": s3_endpoint,
        "run.s3.region": s3_region,
        "run.s3.profile": s3_profile,
    }
    job = job_config(config, given)
    if dry_run:
        from flows.estimate import estimate
        from pipeline.run import prepare

        resolved, plan = prepare(job, dry_run=True)
        show.plan(console, resolved, plan, estimate(resolved, plan))
        raise typer.Exit(1 if plan.unreadable else 0)
    run_job(job)


@app.command()
def status(
    destination: Finished,
    s3_endpoint: S3Endpoint = None,
    s3_region: S3Region = None,
    s3_profile: S3Profile = None,
) -> None:
    """Show what is committed, what is still open, and what was quarantined and why."""
    from pipeline.inspection import read_status

    found = read_status(_open(destination, s3_endpoint, s3_region, s3_profile))
    show.status(console, found)


@app.command()
def inspect(
    destination: Finished,
    asset: Annotated[str | None, typer.Argument(help="Asset id. Without it, every stored byte is checked.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    trust: Trust = None,
    s3_endpoint: S3Endpoint = None,
    s3_region: S3Region = None,
    s3_profile: S3Profile = None,
) -> None:
    """Show the provenance of an asset, its hashes and signature checked again, or check the whole destination.

    Exit codes: 0 file, row, rights and signature agree; 1 something does not hold, and is named; 2 cannot be checked.
    """
    from pipeline.inspection import inspect_asset, verify_destination
    from pipeline.provenance.signer import read_authorities

    store = _open(destination, s3_endpoint, s3_region, s3_profile)
    authorities = read_authorities(trust) if trust else ""
    if asset is None:
        results: Any = verify_destination(store, authorities)
    else:
        results = inspect_asset(store, asset, authorities)
    if as_json:
        console.print_json(json.dumps(results, default=str))
    else:
        show.inspection(console, results)


@app.command()
def verify(
    destination: Finished,
    source: Annotated[str | None, typer.Option("--source", help="The originals. [default: as protected from]")] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="Settings (YAML: attack, run). Options win over it.")
    ] = None,
    groups: Annotated[
        int | None, typer.Option("--groups", help="Groups of images to customize models on. [default: 10]")
    ] = None,
    edited: Annotated[int | None, typer.Option("--edited", help="Images to edit. [default: 4]")] = None,
    purifier: Annotated[
        list[str] | None, typer.Option("--purifier", "-p", help="Beside none; repeatable. [default: chain]")
    ] = None,
    customizer: Annotated[
        str | None, typer.Option("--customizer", help="See `fixative attack list`. [default: dreambooth]")
    ] = None,
    preset: Annotated[str | None, typer.Option("--preset", help="quick or literature. [default: quick]")] = None,
    editor: Annotated[
        list[str] | None, typer.Option("--editor", "-e", help="Repeatable. [default: sdedit-0.5-quick]")
    ] = None,
    attack_model: attack.Models = None,
    metric: Metrics = None,
    subject_column: Annotated[str | None, typer.Option("--subject-column", help="Names each image's subject.")] = None,
    class_column: Annotated[str | None, typer.Option("--class-column", help='Names its class, e.g. "dog".')] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Folder of this machine for a page with pictures (they show originals). A small strip of public ones, "
            "protected images and what was drawn from them, goes into Prefect's database.",
        ),
    ] = None,
    actors: Annotated[int | None, typer.Option("--actors", help="Attackers. [default: one per GPU or core]")] = None,
    single_writer: SingleWriter = None,
    s3_endpoint: S3Endpoint = None,
    s3_region: S3Region = None,
    s3_profile: S3Profile = None,
) -> None:
    """Attack a sample of a protected archive and measure what is left: purify, customize, edit, with a clean control.

    Writes reports/verify-ID/ into the destination and never touches a manifest; run it again to go on after a stop.

    Example: fixative verify s3://stock-protected/2026 --groups 15 -p chain -p gridpure --out report
    """
    given = {
        "destination": destination,
        "source": source,
        "attack.groups": groups,
        "attack.edited": edited,
        "attack.purifiers": purifier,
        "attack.customizer": customizer,
        "attack.customizer_preset": preset,
        "attack.editors": editor,
        "attack.models": attack.kinds(attack_model) or None,
        "attack.metrics": metrics_asked(metric) or None,
        "attack.subject_column": subject_column,
        "attack.class_column": class_column,
        "run.actors": actors,
        "run.single_writer": single_writer,
        "run.s3.endpoint_url": s3_endpoint,
        "run.s3.region": s3_region,
        "run.s3.profile": s3_profile,
    }
    run_verification(settings(VerifyConfig, config, given), out)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Show this one in full, with its presets.")] = None,
) -> None:
    """List the protection methods."""
    if name is None:
        show.methods(console)
    else:
        show.method(console, name)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Where to build the archive and the results.")] = Path("demo-out"),
    method: Annotated[str, typer.Option("--method", help="See `fixative methods`.")] = "photoguard",
    attacked: Annotated[
        bool,
        typer.Option("--attack/--no-attack", help="Also customize a model on a group of its images, and edit two."),
    ] = True,
) -> None:
    """Build a small archive of real photographs, protect it, attack it, and draw what came of it."""
    from flows.demo import ATTACK, build_archive, contact_sheet, discard_other_demo

    archive, protected = build_archive(out / "archive"), out / "protected"
    config = job_config(None, {"source": str(archive), "destination": str(protected), "job.method.name": method})
    if discard_other_demo(config):
        console.print(f"{protected} was made by another version or method; it is made anew")
    outcome = run_job(config)
    sheet = contact_sheet(outcome.job, out / "contact-sheet.png")
    if attacked:
        quick = {"destination": str(protected), **{f"attack.{name}": value for name, value in ATTACK.items()}}
        run_verification(settings(VerifyConfig, None, quick), out / "report")
    show.demo(console, outcome, archive, sheet)


def run_job(config: JobConfig) -> Any:
    """Runs the flow with progress on the terminal and prints the summary.

    Raises:
        typer.Exit: With 1, when the run ended with problems.
    """
    preflight(config)  # before a server starts: a typing error should not take ten seconds
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")  # this command prints errors itself, in one line
    from flows.progress import shown_on
    from flows.protect import RunIncomplete, protect_archive

    try:
        with shown_on(console):
            outcome = protect_archive(config)
    except RunIncomplete as incomplete:
        show.outcome(console, incomplete.outcome)
        raise typer.Exit(1) from incomplete
    show.outcome(console, outcome)
    return outcome


def run_verification(config: VerifyConfig, out: Path | None) -> None:
    """Runs the flow with progress on the terminal and prints what was measured."""
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")  # this command prints errors itself, in one line
    from flows.progress import shown_on
    from flows.verify import VerificationIncomplete, verify_archive

    try:
        with shown_on(console):
            verified = verify_archive(config, out)
    except VerificationIncomplete as incomplete:
        show.verified(console, incomplete.verified)
        raise
    show.verified(console, verified)


def _open(url: str, endpoint: str | None, region: str | None, profile: str | None) -> Any:
    from pipeline.job import storage_options
    from pipeline.storage import open_store

    return open_store(url, storage_options(S3Settings(endpoint_url=endpoint, region=region, profile=profile)))


def _on_sigterm(*_: object) -> None:
    raise SystemExit(128 + signal.SIGTERM)


def main(run: Callable[[], Any] = app) -> None:
    """Runs the command; errors that are the user's to mend take one line."""
    signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        run()
    except (UserError, ModelError, ReferenceModelError) as error:
        errors.print(f"fixative: {error}", style="red", highlight=False, soft_wrap=True, markup=False)
        sys.exit(2)
    except PipelineError as error:
        errors.print(f"fixative: {error}", style="red", highlight=False, soft_wrap=True, markup=False)
        sys.exit(1)
    except SystemExit as ended:  # typer makes one of Ctrl-C too
        if ended.code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            errors.print("fixative: interrupted; run the same command to go on", style="yellow")
        raise


if __name__ == "__main__":
    main()
