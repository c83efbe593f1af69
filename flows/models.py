"""``fixative models``: the embedded reference models, how to train one for another domain, and what they measure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from flows import show
from pipeline.errors import UserError
from pipeline.settings_yaml import read_yaml

if TYPE_CHECKING:
    from pipeline.laboratory.figures import Figure
    from protectors.reference.checkpoint import Cursor
    from protectors.reference.train import Task

app = typer.Typer(
    no_args_is_help=True,
    help="The embedded reference models: small, trained from scratch, for trying everything offline.",
)
console = show.terminal()


@app.command("list")
def list_models() -> None:
    """List the embedded models and check their weights against the digests in the code."""
    from protectors.reference import PINNED, reference_path, verify_reference

    table = Table("model", "MB", "folder")
    for name in sorted(PINNED):
        with _user_errors():
            verify_reference(name)
        folder = reference_path(name)
        size = sum((folder / file).stat().st_size for file in PINNED[name])
        table.add_row(name, f"{size / 1e6:.1f}", str(folder))
    console.print(table)


@app.command()
def train(
    model: Annotated[str, typer.Argument(help="nano-sd, nano-ddpm or nano-embed.")],
    data: Annotated[Path, typer.Option("--data", help="Parquet with columns asset_id, image {bytes}, caption.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the finished model.")],
    work: Annotated[
        Path | None, typer.Option("--work", help="Checkpoints and loss curves. [default: OUT.training]")
    ] = None,
    minutes: Annotated[float, typer.Option("--minutes", help="Wall clock of each stage.")] = 60.0,
    stage: Annotated[
        list[str] | None, typer.Option("--stage", help="Only this stage (nano-sd has vae, decoder, sd); repeatable.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="A field of a stage's plan, as stage.field=value; repeatable.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Decides weights, order, crops and noise.")] = 0,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option("--threads", help="Of torch. [default: all cores]")] = None,
    size: Annotated[str, typer.Option("--size", help="nano, or tiny for a first try in seconds.")] = "nano",
    fp32: Annotated[bool, typer.Option("--fp32", help="No bfloat16: slower, on any processor.")] = False,
    limit: Annotated[int | None, typer.Option("--limit", help="Use at most so many training photos.")] = None,
    begin: Annotated[
        Path | None, typer.Option("--begin", help="nano-sd: folder whose UNet and text encoder are trained on.")
    ] = None,
    report_every: Annotated[int, typer.Option("--report-every", help="Updates per line of the loss curve.")] = 250,
    stop_at: Annotated[int | None, typer.Option("--stop-at", help="Stop before this update.")] = None,
) -> None:
    """Train a reference model from scratch on your own photographs.

    A fifth of the photos, chosen by the hash of their id, is held out and never trained on. It stops by itself
    when the time is used, and the same command goes on from there; the learning rate reaches zero at the planned
    number of updates, so choose --set STAGE.steps=N to fit the time. Exit code 1 says that the plan is not done yet.

    Example: fixative models train nano-embed --data photos.parquet --out my-embed --minutes 20
    """
    import torch

    from protectors.reference.curves import draw_curve
    from protectors.reference.recipes import TrainingOrder, train_model

    if threads is not None:
        torch.set_num_threads(threads)
    work = work or out.with_name(out.name + ".training")
    order = TrainingOrder(
        model=model,
        data=data,
        out=out,
        work=work,
        minutes=minutes,
        stages=tuple(stage or ()),
        seed=seed,
        device=device,
        size=size,
        bf16=not fp32,
        limit=limit,
        begin=begin,
        stop_at=stop_at,
        report_every=report_every,
        plans=_plans(overrides or []),
    )
    with _user_errors(), _Bars(console) as bars:
        results = train_model(order, bars)
    for result in results:
        curve = draw_curve(work / f"{result.stage}.csv", work / f"{result.stage}.png")
        line = f"{result.stage}: {result.step} of {result.steps} updates, {result.seconds:.0f} s now"
        console.print(line if curve is None else f"{line}; curve {curve}", highlight=False)
    console.print(f"wrote {out}", highlight=False)
    if not results[-1].complete:
        console.print("Not finished yet: run the same command to go on.", style="yellow")
        raise typer.Exit(1)


@contextmanager
def _user_errors() -> Iterator[None]:
    """What is wrong with files, photos and options takes one line."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise UserError(" ".join(str(error).split())) from error


@app.command()
def evaluate(
    models: Annotated[list[str] | None, typer.Argument(help="Which models. [default: all]")] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="The Parquet they were trained on; its held-out rows are used.")
    ] = None,
    subjects: Annotated[
        Path | None, typer.Option("--subjects", help="Parquet with columns subject and subject_class as well.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="For evaluation.json and pictures.")] = Path("evaluation"),
    folder: Annotated[
        list[str] | None, typer.Option("--folder", help="A model of your own in place of one, as nano-sd=FOLDER.")
    ] = None,
    workers: Annotated[int, typer.Option("--workers", help="Processes of one thread for personalization.")] = 2,
    quick: Annotated[
        bool, typer.Option("--quick", help="A minute, on photographs that scikit-image carries; no bars.")
    ] = False,
) -> None:
    """Measure the reference models: fidelity, fragility, personalization, purification, with intervals and bars.

    Without --quick it takes hours on two cores, most of it personalization; when interrupted, the same command goes on.

    Example: fixative models evaluate --data photos_train.parquet --subjects subjects_dev.parquet --out evaluation
    """
    from pipeline.laboratory.evaluate import Evaluation, evaluate_quick
    from pipeline.laboratory.evaluate import evaluate as measure

    folders = _folders(folder or [])
    unknown = set(models or ()) - set(folders)
    if unknown:
        raise UserError(f"no model {', '.join(sorted(unknown))}; there are: {', '.join(folders)}")
    if quick:
        from flows.demo import demo_photos

        if models or data or subjects:
            raise UserError("--quick measures all models on photos of its own: leave out MODELS, --data and --subjects")
        with _user_errors():
            found = evaluate_quick(folders, demo_photos(), out)
    else:
        if data is None or subjects is None:
            raise UserError("name --data and --subjects, or use --quick for a look on other photographs")
        order = Evaluation(
            models=tuple(models or folders), folders=folders, data=data, subjects=subjects, out=out, workers=workers
        )
        with _user_errors():
            found = measure(order, lambda text: console.print(text, highlight=False, markup=False))
    _print_figures(found)
    console.print(f"wrote {out / 'evaluation.json'}", highlight=False)


def _folders(own: list[str]) -> dict[str, Path]:
    from protectors.reference import PINNED, reference_path, verify_reference

    given = dict(text.partition("=")[::2] for text in own)
    if not set(given) <= set(PINNED) or not all(given.values()):
        raise UserError(f"--folder: write MODEL=FOLDER with one of {', '.join(sorted(PINNED))}")
    for name in set(PINNED) - set(given):
        with _user_errors():
            verify_reference(name)
    return {name: Path(given[name]) if name in given else reference_path(name) for name in sorted(PINNED)}


def _print_figures(found: list[Figure]) -> None:
    table = Table("model", "figure", "value", "95 % interval", "bar", "", "sample")
    for figure in found:
        interval = "" if figure.low is None or figure.high is None else f"{figure.low:.3g} to {figure.high:.3g}"
        least, most = figure.at_least, figure.at_most
        bar = f">= {least:g}" if least is not None else f"<= {most:g}" if most is not None else ""
        verdict = {True: "[green]reached[/green]", False: "[red]missed[/red]", None: ""}[figure.reached]
        table.add_row(figure.model, figure.name, f"{figure.value:.4g}", interval, bar, verdict, figure.sample)
    console.print(table)
    barred = [figure for figure in found if figure.reached is not None]
    if barred:
        console.print(f"{sum(figure.reached is True for figure in barred)} of {len(barred)} bars reached")


def _plans(overrides: list[str]) -> dict[str, dict[str, Any]]:
    plans: dict[str, dict[str, Any]] = {}
    for text in overrides:
        name, mark, value = text.partition("=")
        stage, dot, field = name.partition(".")
        if not (mark and dot):
            raise UserError(f"--set {text}: write stage.field=value, for example sd.steps=8000")
        plans.setdefault(stage, {})[field] = _value(value)
    return plans


def _value(text: str) -> Any:
    try:
        return read_yaml(text)
    except yaml.YAMLError:
        return text


class _Bars:
    """One progress bar per stage; a line of figures whenever the curve gets one."""

    def __init__(self, output: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}"),
            TimeRemainingColumn(),
            console=output,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> _Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def step(self, task: Task, cursor: Cursor, loss: float) -> None:
        """Moves the stage's bar."""
        if task.name not in self._tasks:
            self._tasks[task.name] = self._progress.add_task(task.name, total=task.steps, loss=loss)
        self._progress.update(self._tasks[task.name], completed=cursor.step, loss=loss)

    def note(self, text: str) -> None:
        """Prints a line."""
        self._progress.console.print(text, highlight=False)

    def row(self, task: Task, row: Mapping[str, float]) -> None:
        """Prints a line of the curve."""
        figures = "  ".join(f"{name} {value:.4g}" for name, value in row.items())
        self._progress.console.print(f"{task.name}  {figures}", highlight=False)
