"""What is left of AntiPure after GrIDPure on the embedded models, beside AdvDM and random signs, and which part acts.

A asks whether AntiPure leaves more than AdvDM after GrIDPure with 20 iterations, all at 8 levels. B changes one part of
AntiPure (preset `fast`) at a time, after GrIDPure with 4 iterations, and compares with the unchanged one.

Photos: centre squares of photos that no embedded model was trained on. The attacker's noise is the same for all arms
of a photo, so that `shift` compares pictures, not draws; the arm "clean, other noise" shows what another draw does.

`shift` is the figure that decides: the mean squared distance of nano-sd's latents (the posterior's mean, unscaled) of
the purified picture from those of the purified original, which is what is left for a trainer of latent models. Beside
it: `before`, the same without purifier; `residual`, rms of purified picture less original, in 8-bit levels; `ssim` of
the two; `moved`, rms of purified less protected picture, in levels: how far the purifier goes. Two more, added when the
first photo was seen, tell a purifier that is led astray from one that takes the perturbation d off, which moves far as
well: `change`, rms of d in levels, and `kept`, <Pure(x + d) - Pure(x), d> / <d, d>, 0 where nothing of d is left.

Intervals are 95 % bootstrap intervals over photos, p-values of differences are from sign flips (6 photos: 0.031 at the
least), neither is corrected for the number of rows. Percentile intervals of six photos are too narrow: a first look.

Every picture is stored in OUT by all that decides it: a second call goes on where the first stopped. OUT then holds
pictures of the originals.

Example: python infra/bench/antipure.py --data photos_train.parquet --out antipure-bench --photos 6 --only A
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from pipeline.ids import asset_seed, fingerprint, sha256_hex
from pipeline.verify.attack_models import EMBEDDED, AttackModels
from pipeline.verify.bootstrap import Plan, Sample, figures_with_intervals, sign_flip_p
from pipeline.verify.digest import folder_digest
from pipeline.verify.purifiers import PURIFIERS
from protectors.base import ImageProtector
from protectors.config import ProtectorConfig
from protectors.constraints import LEVELS, to_levels
from protectors.diffusion import DiffusionModel, load_model
from protectors.loading import load_for, model_source
from protectors.reference import reference_path
from protectors.reference.data import centre_crop, decode_photo, is_held_out, read_columns
from protectors.reference.quality import ssim
from protectors.registry import protector_class

EPS_LEVELS = 8.0
# With the decimals that are printed.
MEASURES = {"shift": 4, "before": 4, "residual": 2, "ssim": 4, "moved": 2, "change": 2, "kept": 3}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What is done to a photo before the purifier gets it."""

    label: str
    # None: nothing.
    method: str | None = None
    preset: str = "fast"
    changes: Mapping[str, Any] = field(default_factory=dict)
    # Number of the purifier's draw; arms are compared at draw 0.
    draw: int = 0


CLEAN = Arm(label="clean")
CONTROLS = (
    CLEAN,
    Arm(label="clean, other noise", draw=1),
    Arm(label="random signs", method="static"),
    Arm(label="advdm", method="advdm"),
)
DEFAULT = Arm(label="antipure fast", method="antipure")
CHANGES: tuple[Mapping[str, Any], ...] = (
    {"lambda1": 0.0},
    {"lambda2": 0.0},
    {"lambda1": 0.0, "lambda2": 0.0},
    {"pfg_form": "abs"},
    {"pfg_form": "energy"},
    {"t_err": 50},
    {"t_err": 250},
    {"t_err": 500},
    {"patch_size": 4},
    {"patch_size": 16},
    {"patch_shift": True},
    {"clip_xhat0": True},
    {"etg_grad": "t"},
    {"etg_grad": "t_err"},
    {"tile_layout": "grid"},
    {"tp": 50},
    {"n_eot": 2},
)
VARIANTS = tuple(
    Arm(label=", ".join(f"{name}={value}" for name, value in changes.items()), method="antipure", changes=changes)
    for changes in CHANGES
)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Arms after one purifier, and the pairs of labels whose differences are taken, first less second."""

    purifier: str
    arms: tuple[Arm, ...]
    differences: tuple[tuple[str, str], ...]


EXPERIMENTS = {
    "A": Experiment(
        purifier="gridpure",
        arms=(
            *CONTROLS,
            Arm(label="noise", method="noise"),
            DEFAULT,
            Arm(label="antipure common", method="antipure", preset="common"),
        ),
        differences=tuple(
            (ours, other)
            for ours in ("antipure fast", "antipure common")
            for other in ("advdm", "random signs", "noise")
        ),
    ),
    "B": Experiment(
        purifier="gridpure-quick",
        arms=(*CONTROLS, DEFAULT, *VARIANTS),
        differences=(
            (DEFAULT.label, "advdm"),
            (DEFAULT.label, "random signs"),
            *((arm.label, DEFAULT.label) for arm in VARIANTS),
        ),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Task:
    """One arm of one photo."""

    arm: Arm
    purifier: str
    # uint8 (3, S, S), and the number that all its draws follow from.
    photo: Tensor
    seed: int
    device: str
    file: Path


def read_photos(data: Path, count: int, side: int, seed: int) -> list[Tensor]:
    """`count` held-out photos as uint8 `(3, side, side)`; more photos with the same seed begin with the same ones."""
    table = read_columns(data, ("asset_id", "image"))
    names = [str(name) for name in table.column("asset_id").to_pylist()]
    rows = [row for row, name in enumerate(names) if is_held_out(name)]
    if len(rows) < count:
        raise SystemExit(f"{data} has {len(rows)} held-out photos, not {count}: use --photos {len(rows)} or fewer")
    chosen = np.random.default_rng(seed).permutation(rows)[:count].tolist()
    encoded = {row: table.column("image")[row].as_py()["bytes"] for row in chosen}
    crops = [centre_crop(decode_photo(encoded[row], names[row]), side) for row in chosen]
    return [to_levels(crop).to(torch.uint8) for crop in crops]


def config_of(arm: Arm) -> ProtectorConfig:
    """The configuration of an arm with a method, at the budget of all."""
    preset = protector_class(str(arm.method)).presets[arm.preset]
    return preset.replace(eps_levels=EPS_LEVELS, **arm.changes)


def identity(arm: Arm) -> dict[str, Any] | None:
    """Method, version and every field of the configuration; None for the photo itself."""
    if arm.method is None:
        return None
    return {"name": arm.method, "version": protector_class(arm.method).version, "config": config_of(arm).to_dict()}


def plan_tasks(experiment: Experiment, photos: Sequence[Tensor], options: argparse.Namespace) -> list[Task]:
    """All arms of all photos, photo by photo; each file is named by all that decides its pictures."""
    tasks = []
    models = {str(kind): folder_digest(reference_path(name)) for kind, name in EMBEDDED.items()}
    for photo in photos:
        digest = sha256_hex(photo.numpy().tobytes())
        seed = asset_seed(digest, str(options.seed))
        for arm in experiment.arms:
            about = {
                "photo": digest,
                "seed": seed,
                "method": identity(arm),
                "purifier": {**PURIFIERS[experiment.purifier].parameters(), "draw": arm.draw},
                "models": models,
                "torch": torch.__version__,
                "device": options.device,
            }
            file = options.out / "pictures" / f"{fingerprint(about)[:24]}.npz"
            common = {"purifier": experiment.purifier, "photo": photo, "seed": seed, "device": options.device}
            tasks.append(Task(arm=arm, file=file, **common))
    return tasks


@cache
def surrogate(method: type[ImageProtector[Any, Any]], device: str) -> Any:
    """The embedded model that a method attacks; None for one that needs none."""
    if not method.needs_model():
        return None
    return load_for(method, str(reference_path(str(model_source(method).embedded))), device=device, dtype=torch.float32)


attack_models = cache(lambda device: AttackModels(device=device))


def run(task: Task) -> None:
    """Protects and purifies, and stores both pictures in one file, whole or not at all."""
    torch.set_num_threads(1)
    protected = task.photo[None]
    if task.arm.method is not None:
        method = protector_class(task.arm.method)
        protector = method(config_of(task.arm), surrogate(method, task.device))
        result = protector.protect(protected.float() / LEVELS, seeds=[task.seed])
        if result.facts[0].failed:
            raise RuntimeError(f"{task.arm.label}: {result.facts[0].failed}")
        protected = to_levels(result.images).to(torch.uint8)
    noise = [asset_seed(str(task.seed), "purifier", str(task.arm.draw))]
    purified = PURIFIERS[task.purifier].purify(protected, seeds=noise, models=attack_models(task.device))
    task.file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = task.file.with_name(f".{uuid.uuid4().hex}.npz")
    np.savez_compressed(unfinished, protected=protected[0].numpy(), purified=purified[0].numpy())
    os.replace(unfinished, task.file)


def run_all(tasks: Sequence[Task], workers: int) -> None:
    """Runs what is not stored yet, and shows how far it is."""
    missing = [task for task in tasks if not task.file.is_file()]
    print(f"{len(tasks) - len(missing)} of {len(tasks)} are stored already")
    if workers == 1:
        for task in track(missing):
            run(task)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for _ in track(pool.map(run, missing), total=len(missing)):
            pass


def measure(tasks: Sequence[Task]) -> dict[str, dict[str, list[float]]]:
    """The figures of every arm, by label and measure, one value per photo in their order."""
    model = load_model(str(reference_path()))
    by_label: dict[str, list[Task]] = {}
    for task in tasks:
        by_label.setdefault(task.arm.label, []).append(task)
    pictures = {label: _pictures(group) for label, group in by_label.items()}
    latents = {label: [_latents(model, images) for images in pair] for label, pair in pictures.items()}
    (originals, cleaned), clean = pictures[CLEAN.label], latents[CLEAN.label]
    figures = {}
    for label, (protected, purified) in pictures.items():
        before, after = (_distance(*pair) for pair in zip(latents[label], clean, strict=True))
        values = {
            "shift": after,
            "before": before,
            "residual": _distance(purified, originals).sqrt() * LEVELS,
            "ssim": ssim(purified, originals),
            "moved": _distance(purified, protected).sqrt() * LEVELS,
            "change": _distance(protected, originals).sqrt() * LEVELS,
        }
        if by_label[label][0].arm.method is not None:
            values["kept"] = _share(purified - cleaned, protected - originals)
        figures[label] = {name: each.tolist() for name, each in values.items()}
    return figures


def _pictures(tasks: Sequence[Task]) -> tuple[Tensor, Tensor]:
    """What an arm did to all photos, `(N, 3, S, S)` in [0, 1]: protected, then purified as well."""
    stored = [np.load(task.file) for task in tasks]
    protected, purified = (
        torch.from_numpy(np.stack([file[name] for file in stored])).float() / LEVELS
        for name in ("protected", "purified")
    )
    return protected, purified


@torch.no_grad()
def _latents(model: DiffusionModel, images: Tensor) -> Tensor:
    return model.encode_moments(images)[0]


def _distance(first: Tensor, second: Tensor) -> Tensor:
    """Mean squared difference per picture."""
    return (first - second).square().flatten(1).mean(1)


def _share(left: Tensor, change: Tensor) -> Tensor:
    """How much of a change is in what is left of it, per picture."""
    return (left * change).flatten(1).sum(1) / change.square().flatten(1).sum(1)


def rows_of(experiment: Experiment, figures: Mapping[str, Any], seed: int) -> list[dict[str, Any]]:
    """One row per arm and per difference and measure, with its interval."""
    rows = []
    for label, against in [*((arm.label, None) for arm in experiment.arms), *experiment.differences]:
        for measured in MEASURES:
            if measured not in figures[label]:
                continue  # nothing is kept of no change
            values = np.array(figures[label][measured])
            if against is not None:
                values = values - np.array(figures[against][measured])
            sample = Sample.of_units(values[:, None])
            interval = figures_with_intervals(sample, lambda drawn: {"mean": drawn.mean((1, 2))}, Plan(seed=seed))[
                "mean"
            ]
            rows.append(
                {
                    "arm": label,
                    "less": against,
                    "measure": measured,
                    "photos": len(values),
                    "value": interval.value,
                    "low": interval.low,
                    "high": interval.high,
                    "p": None if against is None or len(values) < 2 else sign_flip_p(values, seed=seed),
                }
            )
    return rows


def show(title: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Prints arms, then differences, a line each."""
    lines: dict[tuple[str, str | None], dict[str, str]] = {}
    for row in rows:
        lines.setdefault((row["arm"], row["less"]), {})[row["measure"]] = _cell(row)
    table = Table("arm", *MEASURES, title=title)
    for (label, against), cells in lines.items():
        name = label if against is None else f"{label} - {against}"
        table.add_row(name, *(cells.get(measured, "") for measured in MEASURES))
    Console(width=220).print(table)


def _cell(row: Mapping[str, Any]) -> str:
    sign, decimals = "" if row["less"] is None else "+", MEASURES[row["measure"]]
    numbers = [f"{row[name]:{sign}.{decimals}f}" for name in ("value", "low", "high") if row[name] is not None]
    return numbers[0] if len(numbers) == 1 else f"{numbers[0]} \\[{numbers[1]}, {numbers[2]}]"


def main() -> None:
    """Prints the tables and writes them to OUT, with every photo's figures in the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="Parquet with columns asset_id and image")
    parser.add_argument("--out", type=Path, required=True, help="folder of pictures and tables")
    parser.add_argument("--photos", type=int, default=6, help="from 20 on intervals are BCa; six are few")
    parser.add_argument("--only", choices=sorted(EXPERIMENTS), help="one of the two experiments")
    parser.add_argument("--purifier", choices=PURIFIERS, metavar="NAME", help="in place of the experiment's own")
    parser.add_argument("--side", type=int, default=128, help="of a photo in pixels")
    parser.add_argument("--seed", type=int, default=0, help="chooses photos, and all draws")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    photos = read_photos(options.data, options.photos, options.side, options.seed)
    settings = {"data": options.data.name, "side": options.side, "seed": options.seed, "device": options.device}
    for name in [options.only] if options.only else EXPERIMENTS:
        experiment = EXPERIMENTS[name]
        if options.purifier:
            experiment = replace(experiment, purifier=options.purifier)
        tasks = plan_tasks(experiment, photos, options)
        run_all(tasks, options.workers)
        figures = measure(tasks)
        rows = rows_of(experiment, figures, options.seed)
        show(f"{name}: {len(photos)} photos, after {experiment.purifier}, {EPS_LEVELS:g} levels", rows)
        document = {
            "settings": settings,
            "purifier": PURIFIERS[experiment.purifier].parameters(),
            "arms": {arm.label: identity(arm) for arm in experiment.arms},
            "rows": rows,
            "figures": figures,
        }
        stem = f"{name}-{experiment.purifier}"
        (options.out / f"{stem}.json").write_text(json.dumps(document, indent=1))
        with (options.out / f"{stem}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
