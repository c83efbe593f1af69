"""``fixative verify-model``: how much a protected model resists, and what else it lost."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from flows import show
from flows.progress import observer, shown_on
from flows.settings import overrides_of
from pipeline.errors import PipelineError, UserError

if TYPE_CHECKING:
    from pipeline.verify_model.plan import VerificationPlan
    from pipeline.verify_model.results import Findings
    from pipeline.verify_model.store import Results

app = typer.Typer()
console = show.terminal()

_what, _attack, _cost, _how = (
    partial(typer.Option, rich_help_panel=panel) for panel in ("What is verified", "Attacks", "Costs", "How it runs")
)
_MOST_ERRORS = 5  # in the message; all of them are in verification.json


class VerificationIncomplete(PipelineError):
    """Some trials failed; the rest is reported."""


_HELP = (
    "Attack protected models and their base alike, and tell what protection prevents, leaves and costs.\n\n"
    "Both models are customized on the same photos with the same seeds. [bold]Prevented[/bold] is the share of what "
    "the attack gains on the base that it does not gain on the protected model; it should be 0.5 or more. "
    "[bold]Kept[/bold] is the share that is left for other subjects, of the same class and of others; it should be 0.8 "
    "or more. The held-out denoising loss should rise by 5 % at most. A missed bar is a result and no error.\n\n"
    "Photos are told apart by the hashes in the model's provenance: those that it was protected on are seen, the "
    "subject's other ones unseen. Likeness is always to photos that the attacker does not have. The first of --sets, "
    "--identifiers and --attacks is the centre; every further one is a row of its own that differs from it in that one "
    "thing.\n\n"
    "Several models of one label are one method on several concepts, and intervals are over concepts; of one concept "
    "alone over --trainings, or with one of them over its drawn pictures. Writes verification.json (every number), "
    ".md and .png, and sheet.png, which shows the photos themselves. Every trial is stored under a name that follows "
    "from all that decides it: run the same command again to go on after a stop; those of the base are shared by all "
    "models.\n\n"
    "Example: fixative verify-model protected --base nano-sd --photos subjects.parquet --held-out photos.parquet "
    "--out verification\n\n"
    "Two methods: fixative verify-model apdm=dog apdm=cat naive=dog-naive naive=cat-naive --against naive ..."
)


@app.command("verify-model", help=_HELP)
def verify_model(
    protected: Annotated[
        list[str], typer.Argument(metavar=r"\[LABEL=]PROTECTED...", help="Folders that protect-model has written.")
    ],
    base: Annotated[str, _what("--base", help="The model that they were made from: nano-sd, a folder or a hub id.")],
    photos: Annotated[
        Path,
        _what("--photos", help="Parquet with asset_id, image, subject, subject_class: the concepts and others."),
    ],
    out: Annotated[
        Path, _what("--out", help="Folder for tables, pictures and all stored results. It will show originals.")
    ],
    against: Annotated[
        str | None, _what("--against", help="A label: what the others prevent less what it does, with intervals.")
    ] = None,
    sets: Annotated[
        str, _attack("--sets", help="Of seen, unseen, flipped and blurred (the seen ones).")
    ] = "seen,unseen,flipped,blurred",
    identifiers: Annotated[
        str, _attack("--identifiers", help="Rare words for the subject, e.g. sks,ktn. (Default: the attack's own.)")
    ] = "",
    attacks: Annotated[
        str, _attack("--attacks", help=r"Customizers as name\[:preset]; see `fixative attack list`.")
    ] = "dreambooth",
    others: Annotated[
        int, _attack("--others", help="Other subjects to teach, of the same class and of others: so many each.", min=0)
    ] = 2,
    trainings: Annotated[
        int, _attack("--trainings", help="How often each attack is made, each time from another seed.", min=1)
    ] = 1,
    overrides: Annotated[
        list[str] | None, _attack("--set", help="A field of the customizers, as steps=100; repeatable.")
    ] = None,
    generated: Annotated[int, _attack("--generated", help="Images drawn from each customized model.", min=1)] = 8,
    held_out: Annotated[
        Path | None,
        _cost(
            "--held-out",
            help="Parquet with asset_id, image, caption, of photos that the base was not trained on. With an embedded "
            "base only the fifth of the asset ids is taken that no embedded model is trained on.",
        ),
    ] = None,
    held_out_photos: Annotated[int, _cost("--held-out-photos", help="How many of them, at most.", min=1)] = 64,
    prompt: Annotated[
        list[str] | None,
        _cost("--prompt", help="Drawn by both models, unrelated; repeatable. (Default: eight things.)"),
    ] = None,
    draws: Annotated[int, _cost("--draws", help="Images per prompt; 0 draws none, KID needs 2.", min=0)] = 16,
    seed: Annotated[int, _how("--seed", help="Of all random draws.", min=0)] = 0,
    workers: Annotated[
        int | None, _how("--workers", help="Processes of one thread. (Default: one per core; one with cuda.)", min=1)
    ] = None,
    device: Annotated[str, _how("--device", help="cpu or cuda.")] = "cpu",
    dry_run: Annotated[bool, _how("--dry-run", help="Say how much is to do and what is stored.")] = False,
) -> None:
    """Attacks, measures, prints the tables and writes the files."""
    from pipeline.compare.files import check_folder
    from pipeline.laboratory.denoiser import CAPTIONS
    from pipeline.verify_model.files import write_files
    from pipeline.verify_model.plan import Settings, plan_verification
    from pipeline.verify_model.results import gather
    from pipeline.verify_model.run import run_verification
    from pipeline.verify_model.store import Results

    check_folder(out)
    plan = plan_verification(
        Settings(
            protected=tuple(protected),
            base=base,
            photos=photos,
            sets=_names(sets),
            identifiers=_names(identifiers),
            attacks=_names(attacks),
            overrides=overrides_of(overrides) or {},
            others=others,
            trainings=trainings,
            generated=generated,
            held_out=held_out,
            held_out_photos=held_out_photos,
            prompts=tuple(prompt or CAPTIONS),
            drawn=draws,
            device=device,
            seed=seed,
        )
    )
    if against is not None and against not in plan.labels:
        raise UserError(f"--against {against}: no such label; there are {', '.join(plan.labels)}")
    results = Results(out)
    if dry_run:
        _show_plan(plan, results)
        return
    # Every process would load its own models onto the one GPU.
    processes = workers or (1 if device.startswith("cuda") else os.cpu_count() or 1)
    with shown_on(console):
        failed = run_verification(plan, results, observer(), workers=processes)
    found = gather(plan, results, failed, against=against)
    names = write_files(found, results)
    _show(found)
    console.print(f"wrote {', '.join(names)} into {results.folder}", highlight=False, markup=False)
    if found.failed_trials:
        raise VerificationIncomplete("; ".join(_problems(found.failed_trials)))


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _problems(failed: Sequence[str]) -> list[str]:
    more = len(failed) - _MOST_ERRORS
    said = list(failed[:_MOST_ERRORS])
    return [*said, f"{more} more failed trials are in verification.json"] if more > 0 else said


def _show_plan(plan: VerificationPlan, results: Results) -> None:
    for model in plan.protected:
        for concept in model.concepts:
            console.print(
                f"{model.label}: {model.model.folder}, {concept.subject.name}: {len(concept.seen)} seen, "
                f"{len(concept.unseen)} unseen photos",
                highlight=False,
                markup=False,
            )
    finished = results.finished()
    groups: dict[str, list[str]] = {}
    for task in plan.tasks():
        groups.setdefault(task.kind, []).append(task.key)
    for kind, keys in groups.items():
        seconds = [results.seconds(key) for key in keys if key in finished]
        missing = len(keys) - len(seconds)
        cost = f", about {missing * fmean(seconds) / 3600:.1f} hours of one core" if seconds and missing else ""
        console.print(f"{kind}: {missing} to run{cost}, {len(seconds)} stored", highlight=False, markup=False)


def _show(found: Findings) -> None:
    from pipeline.verify_model import report

    _table("Attacks", report.HEADER, report.lines(found))
    if found.differences:
        _table("Prevented, one method less another", report.DIFFERENCE_HEADER, report.difference_lines(found))
    _table("Costs", report.UTILITY_HEADER, report.utility_lines(found))
    for note in report.notes(found):
        console.print(note, highlight=False, markup=False)
    verdicts = report.verdicts(found)
    for line in verdicts:
        console.print(f"not met: {line}", style="yellow", highlight=False, markup=False)
    if not verdicts:
        console.print("every bar is met")


def _table(title: str, header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    from rich.markup import escape

    table = Table(*header, title=title)
    for line in lines:
        table.add_row(*map(escape, line))
    console.print(table)
