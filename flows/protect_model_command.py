"""``fixative protect-model``: a checkpoint on which given subjects cannot be personalized."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from flows import show
from flows.options import S3Endpoint, S3Profile, S3Region
from flows.settings import overrides_of
from pipeline.config import S3Settings
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.protect_model.job import ModelJob
    from pipeline.protect_model.plan import ModelPlan

app = typer.Typer()
console = show.terminal()

_what, _method, _how = (
    partial(typer.Option, rich_help_panel=panel) for panel in ("Concepts and output", "Method", "How it runs")
)

_HELP = (
    "Change a model's weights so that it cannot be personalized on given subjects.\n\n"
    "For whoever hosts or publishes a model: no image is changed. The UNet is trained along simulated attacks (APDM), "
    "so that DreamBooth on photos of the subject fails, while other things can still be drawn and learnt. "
    "[bold]Whoever has the original weights is not hindered[/bold], and how much the new ones hinder, "
    "fixative verify-model measures.\n\n"
    "Writes a diffusers folder: the given model with another UNet, a model card, provenance.json (digests, hashes of "
    "the photos, configuration, seed, versions, curves), curves.png, and positives/: pictures that the model drew "
    "itself to stand beside the photos, with their manifest. No photo, and nothing cut from one. It is written whole "
    "or not at all. Checkpoints lie beside it until then: run the same command again to go on after a stop.\n\n"
    "Everything may lie in S3, or behind any other fsspec URL (then with --single-writer). A model in a bucket is "
    "whole once provenance.json is there; with checkpoints in one, any machine of the same kind goes on where another "
    "was lost.\n\n"
    "The paper's preset is for real models and takes about 9 hours on an RTX A6000; fast is for the embedded ones, and "
    "its rates would ruin a real one. Try --dry-run first.\n\n"
    "Example: fixative protect-model ./stable-diffusion-v1-5 --concept photos-of-rex/ --class-word dog --out protected "
    "--device cuda\n\n"
    "Offline, minutes: fixative protect-model nano-sd --concept subjects.parquet#dog --images 4 --out protected"
)


@app.command("protect-model", help=_HELP)
def protect_model(
    model: Annotated[str, typer.Argument(help="Diffusers folder or URL, hub id, or nano-sd: latent text to image.")],
    concept: Annotated[
        list[str],
        _what(
            "--concept",
            help="Folder or URL of one subject's photos, or FILE.parquet#SUBJECT with columns asset_id, image, "
            "subject, subject_class; repeatable.",
        ),
    ],
    out: Annotated[str, _what("--out", help="Folder or s3:// prefix of the protected model; absent or empty.")],
    class_word: Annotated[
        list[str] | None,
        _what(
            "--class-word",
            help='What a concept is, e.g. "dog": once per --concept, in their order. (Default: subject_class.)',
        ),
    ] = None,
    separate: Annotated[
        bool,
        _what("--separate", help="A model for each --concept, in OUT/<subject or folder>; not one for all."),
    ] = False,
    images: Annotated[
        int | None,
        _what("--images", help="Use at most so many photos of each, the first by name; test with the others.", min=1),
    ] = None,
    method: Annotated[
        str, _method("--method", help="apdm; anchored, our own; imma, to compare with; naive, APDM's negative control.")
    ] = "apdm",
    preset: Annotated[
        str | None,
        _method(
            "--preset",
            help="paper, fast, strong; apdm, anchored: extended. (Default: fast on nano-sd, else paper.)",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        _method("--set", help="Another field of the method, as name=value; repeatable. --dry-run shows them."),
    ] = None,
    positives: Annotated[
        str | None,
        _method("--positives", help="Take up OUT/positives of an earlier run. (Default: the model draws them.)"),
    ] = None,
    keep: Annotated[
        str | None,
        _method(
            "--keep",
            help="Parquet of photos of other things (asset_id, image, caption), such as the model's users draw: on "
            "these it shall do as before. (Default: pictures that it draws itself, which keep far less.)",
        ),
    ] = None,
    keep_images: Annotated[
        int, _method("--keep-images", help="Use at most so many of them, spread over their captions.", min=1)
    ] = 1024,
    seed: Annotated[int, _how("--seed", help="Of all random draws.", min=0)] = 0,
    device: Annotated[str, _how("--device", help="cpu or cuda.")] = "cpu",
    work: Annotated[
        str | None, _how("--work", help="Folder or prefix of checkpoints, emptied at the end. (Default: OUT.training.)")
    ] = None,
    checkpoint_every: Annotated[
        int, _how("--checkpoint-every", help="Updates between checkpoints of three times the UNet.", min=1)
    ] = 10,
    ray_address: Annotated[
        str | None,
        _how(
            "--ray-address",
            help="Train each model as a task on Ray: local (started for this run), auto (the one here), or an address.",
        ),
    ] = None,
    single_writer: Annotated[
        bool, _how("--single-writer", help="OUT and WORK cannot refuse a second writer; promise that there is none.")
    ] = False,
    s3_endpoint: S3Endpoint = None,
    s3_region: S3Region = None,
    s3_profile: S3Profile = None,
    dry_run: Annotated[
        bool, _how("--dry-run", help="Say what would be done, time two short updates, write nothing.")
    ] = False,
) -> None:
    """Reads the concepts, trains, and writes the folder, or a folder for each concept."""
    from pydantic import ValidationError

    from pipeline.protect_model.job import ConceptSource, ModelJob
    from pipeline.protect_model.plan import plan_model
    from pipeline.protect_model.run import protect_model as finish
    from pipeline.protect_model.separate import separated

    words = _words(concept, class_word or [])
    sources = [ConceptSource(path=path, class_word=word) for path, word in zip(concept, words, strict=True)]
    try:
        job = ModelJob(
            model=model,
            concepts=tuple(sources),
            out=out,
            work=work,
            method=method,
            preset=preset,
            overrides=overrides_of(overrides) or {},
            images=images,
            positives=positives,
            keep=keep,
            keep_images=keep_images,
            seed=seed,
            device=device,
            checkpoint_every=checkpoint_every,
            single_writer=single_writer,
            s3=S3Settings(endpoint_url=s3_endpoint, region=s3_region, profile=s3_profile),
        )
    except ValidationError as error:
        raise UserError("; ".join(f"{item['loc'][0]}: {item['msg']}" for item in error.errors())) from error
    jobs = separated(job) if separate else {PurePath(job.out_name).name: job}
    # Before a server starts: a typing error should not take ten seconds.
    plans = {name: plan_model(one, trained_here=ray_address is None) for name, one in jobs.items()}
    for plan in plans.values():
        _show_plan(plan)
        if plan.finished:
            console.print(f"{plan.job.out_name} is finished already", highlight=False, markup=False)
            if not dry_run:
                finish(plan)  # removes what a run left that was killed at its very end
    open_plans = [plan for plan in plans.values() if not plan.finished]
    if dry_run:
        _show_estimate(open_plans, timed=ray_address is None)
    elif separate or ray_address is not None:
        _run_several({name: jobs[name] for name, plan in plans.items() if not plan.finished}, ray_address)
    elif open_plans:
        _run(job)


def _words(concepts: Sequence[str], words: Sequence[str]) -> Sequence[str | None]:
    if words and len(words) != len(concepts):
        raise UserError(
            f"{len(words)} --class-word for {len(concepts)} --concept: give one for each, in the same order"
        )
    return words or [None] * len(concepts)


def _show_plan(plan: ModelPlan) -> None:
    attacks = f", each after {plan.inner_steps} steps of a simulated attacker" if plan.inner_steps else ""
    lines = [
        f"model: {plan.base_name} {plan.identity['base'][:12]}, photos at {plan.side} pixels",
        *(f"concept: {len(concept.images)} photos of a {concept.class_word}" for concept in plan.concepts),
        f"{plan.method.name}, preset {plan.preset}: {plan.updates} updates{attacks}",
    ]
    for line in lines:
        console.print(line, highlight=False, markup=False)


def _show_estimate(plans: Sequence[ModelPlan], *, timed: bool) -> None:
    from pipeline.protect_model.run import seconds_for, unet_bytes

    if not plans:
        return
    for name, value in plans[0].config.to_dict().items():
        console.print(f"  {name}: {json.dumps(value)}", highlight=False, markup=False)
    size = unet_bytes(plans[0]) / 1e6
    console.print(f"UNet: {size:.0f} MB in float32", highlight=False, markup=False)
    for plan in plans:
        console.print(
            f"checkpoints in {plan.job.work_name}: {3 * size:.0f} MB, twice while one is written",
            highlight=False,
            markup=False,
        )
    if timed:
        with console.status("timing two short updates"):
            seconds = sum(seconds_for(plan) for plan in plans)
        console.print(f"about {_duration(seconds)} on this {plans[0].environment['device']}", highlight=False)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _run(job: ModelJob) -> None:
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")  # this command prints errors itself, in one line
    from flows import protect_model as flow
    from flows.progress import shown_on

    with shown_on(console):
        document = flow.protect_model(job)
    table = Table("what", "value")
    for row in flow.summary(document):
        table.add_row(*row)
    console.print(table)
    console.print(f"wrote {job.out_name}", highlight=False, markup=False)


def _run_several(jobs: dict[str, ModelJob], ray_address: str | None) -> None:
    if not jobs:
        return
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")  # this command prints errors itself, in one line
    from flows import protect_model as flow
    from flows.progress import shown_on

    with shown_on(console):
        documents = flow.protect_models(jobs, ray_address)
    table = Table("model", "updates", "relative change", "digest")
    for name, document in documents.items():
        facts, digest = document["facts"], document["weights"]["digest"]
        table.add_row(name, f"{facts['updates']}", f"{facts['drift']:.3g}", digest[:12])
    console.print(table)
    for job in jobs.values():
        console.print(f"wrote {job.out_name}", highlight=False, markup=False)
