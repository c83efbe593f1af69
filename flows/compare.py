"""``fixative compare``: which protection to use, settled by the same attacks on the same subjects."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from flows import show
from flows.attack import Models, kinds
from flows.progress import observer, shown_on
from flows.settings import overrides_of
from pipeline.errors import PipelineError

if TYPE_CHECKING:
    from pipeline.compare.plan import Comparison
    from pipeline.compare.results import Findings
    from pipeline.compare.store import Results

app = typer.Typer()
console = show.terminal()

_what, _attack, _how = (
    partial(typer.Option, rich_help_panel=panel) for panel in ("What is compared", "Attacks", "How it runs")
)


class ComparisonIncomplete(PipelineError):
    """Some methods have no numbers, or some trials failed; the rest is reported."""


MOST_ERRORS = 5  # of failed trials, in the message; all of them are in comparison.json


_HELP = (
    "Protect the same subjects with several methods, attack all of them alike, and print one table.\n\n"
    "Every method protects the training photos of every subject. An attacker then customizes a model on them, or edits "
    "them, without and with each purifier, and does the same with the clean photos. A method's [bold]effect[/bold] is "
    "the share of the attacker's gain that it prevents: 0 is nothing, 1 is all. An edit is held against that of photos "
    "with noise of --eps, the same for all methods. What counts is the worst case over the purifiers. Read it beside "
    "two controls: noise, of the same budget, which a method must beat, and static@255, which destroys the photos and "
    "must show a large effect, or the attack measures nothing.\n\n"
    "Writes comparison.json (every number), .csv, .md (the table), .png (effect against visibility) and sheet.png "
    "(pictures, of the originals too) into the folder. Every result is stored by itself, under a name that follows "
    "from all that decides it, device and library versions among them: run the same command again to go on after a "
    "stop, or with further methods, subjects or attacks to add only those. Further purifiers add only theirs to "
    "customizers; editors run again. A method that fails is a row with its reason, a trial that fails is run again "
    "the next time, and the exit code is 1.\n\n"
    "Example: fixative compare --photos subjects.parquet --out comparison --methods mist,advdm:paper,noise,static@255 "
    "--purifiers jpeg75,gridpure-quick --attacks dreambooth,sdedit-0.5-quick --against noise\n\n"
    "Ablation: a --methods-file with the row {name: mist, label: mist without fusion, overrides: {steps: 50}}."
)


@app.command("compare", help=_HELP)
def compare(
    photos: Annotated[
        Path,
        _what("--photos", help="Parquet with columns asset_id, image, subject, subject_class."),
    ],
    out: Annotated[
        Path,
        _what("--out", help="Folder for tables, pictures and all stored results. It will show originals."),
    ],
    methods: Annotated[
        str,
        _what("--methods", help=r"name\[:preset]\[@levels], between commas; see `fixative methods`."),
    ] = "",
    methods_file: Annotated[
        Path | None,
        _what("--methods-file", help="YAML list of {name, label, preset, eps_levels, overrides}."),
    ] = None,
    eps: Annotated[float, _what("--eps", help="Budget in 8-bit levels of methods without @levels.", min=0)] = 8.0,
    model: Annotated[
        list[str] | None,
        _what("--model", help="What methods optimize against, as latent=FOLDER; repeatable. (Else the embedded ones.)"),
    ] = None,
    subjects: Annotated[str, _what("--subjects", help="A number, the first in alphabetical order; or names.")] = "6",
    against: Annotated[
        str | None,
        _what("--against", help="A method of these: the others' effects less its own, with intervals."),
    ] = None,
    attacks: Annotated[
        str,
        _attack("--attacks", help=r"Customizers as name\[:preset], editors; see `fixative attack list`."),
    ] = "dreambooth",
    purifiers: Annotated[
        str, _attack("--purifiers", help="Tried beside none, between commas; see `fixative attack list`.")
    ] = "",
    overrides: Annotated[
        list[str] | None,
        _attack("--set", help="A field of the customizers, as steps=100; repeatable. Editors have none."),
    ] = None,
    generated: Annotated[int, _attack("--generated", help="Images drawn from each customized model.", min=1)] = 8,
    train: Annotated[int, _attack("--train", help="Photos per subject to protect and train on, at most.", min=1)] = 4,
    attack_model: Models = None,
    seed: Annotated[int, _how("--seed", help="Of all random draws.", min=0)] = 0,
    workers: Annotated[
        int | None, _how("--workers", help="Processes of one thread. (Default: one per core; one with cuda.)", min=1)
    ] = None,
    device: Annotated[str, _how("--device", help="cpu or cuda.")] = "cpu",
    dry_run: Annotated[bool, _how("--dry-run", help="Say how much is to do and what is stored.")] = False,
) -> None:
    """Protects, attacks, prints the tables and writes the files."""
    from pipeline.compare.files import check_folder, write_files
    from pipeline.compare.methods import check_label, parse_methods, read_methods
    from pipeline.compare.plan import Settings, plan_comparison
    from pipeline.compare.results import gather
    from pipeline.compare.run import run_comparison
    from pipeline.compare.store import Results

    check_folder(out)
    specs = [*parse_methods(methods), *(read_methods(methods_file) if methods_file is not None else [])]
    comparison = plan_comparison(
        Settings(
            methods=tuple(specs),
            photos=photos,
            subjects=int(subjects) if subjects.isdecimal() else _names(subjects),
            train=train,
            purifiers=_names(purifiers),
            attacks=_names(attacks),
            overrides=overrides_of(overrides) or {},
            generated=generated,
            eps_levels=eps,
            surrogates=kinds(model),
            models=kinds(attack_model),
            device=device,
            seed=seed,
        )
    )
    if against is not None:
        check_label(against, comparison.methods)
    results = Results(out)
    if dry_run:
        _show_plan(comparison, results)
        return
    # Every process would load its own models onto the one GPU.
    processes = workers or (1 if device.startswith("cuda") else os.cpu_count() or 1)
    with shown_on(console):
        failed = run_comparison(comparison, results, observer(), workers=processes)
    found = gather(comparison, results, failed, against=against)
    names = write_files(found, results)
    _show(found)
    console.print(f"wrote {', '.join(names)} into {results.folder}", highlight=False, markup=False)
    if failed or found.failed_trials:
        raise ComparisonIncomplete("; ".join(_problems(found, failed)))


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _problems(found: Findings, failed: Mapping[str, str]) -> list[str]:
    """Every method that failed, and the first trials that did."""
    problems = [f"{label}: {reason}" for label, reason in failed.items()] + list(found.failed_trials[:MOST_ERRORS])
    more = len(found.failed_trials) - MOST_ERRORS
    return [*problems, f"{more} more failed trials are in comparison.json"] if more > 0 else problems


def _show_plan(comparison: Comparison, results: Results) -> None:
    protections = comparison.protections()
    stored = results.protections()
    done = sum(item.key in stored for item in protections)
    console.print(f"protections of a subject: {len(protections) - done} to run, {done} stored", highlight=False)
    trials, stored = comparison.trials(protections), results.trials()
    for attack in comparison.attacks:
        own = [trial.key for trial in trials if trial.attack == attack]
        seconds = [results.seconds(key) for key in own if key in stored]
        missing = len(own) - len(seconds)
        cost = f", about {missing * fmean(seconds) / 3600:.1f} hours of one core" if seconds and missing else ""
        console.print(f"trials of {attack.label}: {missing} to run{cost}, {len(seconds)} stored", highlight=False)
    for method in comparison.methods:
        if method.failed is not None:
            console.print(f"{method.label} cannot run: {method.failed}", style="yellow", markup=False)


def _show(found: Findings) -> None:
    from rich.markup import escape

    from pipeline.compare import report

    for warning in report.warnings(found):
        console.print(f"mind: {warning}", style="yellow", highlight=False, markup=False)
    for attack in found.comparison.attacks:
        table = Table(*report.header(found), title=attack.label)
        for line in report.lines(found, attack):
            table.add_row(*map(escape, line))
        console.print(table)
        for note in report.notes(found, attack):
            console.print(note, highlight=False, markup=False)
