"""Runs all measurements of the reference models and writes them down."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import diffusers
import torch
import transformers
from torch import Tensor

from pipeline.laboratory import autoencoder, cost, denoiser, neighbours, personalization, purification
from pipeline.laboratory.autoencoder import EncoderAttack
from pipeline.laboratory.figures import Figure
from pipeline.verify.attack_models import ModelKind, load_pipeline
from pipeline.verify.customizers.dreambooth import DreamBooth
from pipeline.verify.embed import Embedder
from protectors.mist import MistConfig, checkerboard
from protectors.reference import NANO_DDPM, NANO_EMBED, NANO_SD
from protectors.reference.data import CropRule, Photos, centre_crop, load_photos, random_crop

Note = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What to measure, on what, and where to write it."""

    models: tuple[str, ...]
    folders: Mapping[str, Path]
    """The folder of every reference model; nano-sd's personalization needs nano-embed's too."""
    data: Path
    """The Parquet that the models were trained on; its held-out rows are measured on."""
    subjects: Path
    """Parquet with columns `subject` and `subject_class` beside those of `data`."""
    out: Path
    workers: int = 2
    photos: int = 256
    """Held-out photos at most, spread over the file."""


def evaluate(order: Evaluation, note: Note) -> list[Figure]:
    """Measures everything; writes `OUT/evaluation.json` and `OUT/samples.png`.

    Personalization takes most of the time; after an interruption it goes on with the next subject.

    Raises:
        ValueError: the Parquet files hold no usable photos.
        OSError: a file cannot be read or written.
    """
    parts: dict[str, Callable[[Evaluation, Note], list[Figure]]] = {
        NANO_EMBED: _embed_figures,
        NANO_DDPM: _ddpm_figures,
        NANO_SD: _sd_figures,
    }
    order.out.mkdir(parents=True, exist_ok=True)  # before hours of work, not after
    found: list[Figure] = []
    for model, measure in parts.items():
        if model in order.models:
            note(f"{model}: measuring")
            found += measure(order, note)
    write(found, order.out / "evaluation.json")
    return found


def write(found: list[Figure], file: Path) -> None:
    """Writes the figures with the versions they were measured under; those of other models in `file` stay."""
    measured = {figure.model for figure in found}
    stored = json.loads(file.read_text())["figures"] if file.exists() else []
    kept = [figure for figure in stored if figure["model"] not in measured]
    versions = {
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }
    document = {
        "figures": [*kept, *(figure.to_dict() for figure in found)],
        "versions": versions,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")


def _embed_figures(order: Evaluation, note: Note) -> list[Figure]:
    subjects = personalization.load_subjects(order.subjects, 256)
    images = torch.cat([subject.photos for subject in subjects])
    names = [subject.name for subject in subjects for _ in subject.photos]
    sample = f"{len(images)} photos of {len(subjects)} subjects"
    return neighbours.figures(Embedder(order.folders[NANO_EMBED]), images, names, sample)


def _ddpm_figures(order: Evaluation, note: Note) -> list[Figure]:
    pipeline = load_pipeline(order.folders[NANO_DDPM], ModelKind.PIXEL)
    held_out = load_photos(order.data, held_out=True, limit=64)
    rule = CropRule(pipeline.unet.config.sample_size, scales=(0.45, 0.45), colour=0)
    tiles = torch.stack([random_crop(image, rule, (0, place)) for place, image in enumerate(held_out.images)])
    sample = f"{len(tiles)} held-out tiles of {tiles.shape[-1]} px"
    return purification.figures(pipeline, tiles, sample, (10, 50, 100), (10, 20, 30, 40, 50))


def _sd_figures(order: Evaluation, note: Note) -> list[Figure]:
    model = order.folders[NANO_SD]
    pipeline = load_pipeline(model)
    pipeline.vae.requires_grad_(False)
    size = 8 * pipeline.unet.config.sample_size
    held_out = load_photos(order.data, held_out=True, limit=order.photos)
    images = _centres(held_out, size)
    seen = f"{len(images)} held-out photos"
    found = autoencoder.fidelity(pipeline.vae, images, seen, (24.0, 0.75))
    subjects = personalization.load_subjects(order.subjects, 256)
    large = torch.cat([subject.photos for subject in subjects])
    found += autoencoder.fidelity(pipeline.vae, large, f"{len(large)} photos of subjects", (26.0, None))
    few = images[:: max(1, len(images) // 32)]
    for levels, bar in ((8, 0.5), (16, 0.9)):
        note(f"nano-sd: encoder attack of {levels} levels")
        found += autoencoder.fragility(
            pipeline.vae, few, f"{len(few)} held-out photos", EncoderAttack(levels=levels), (bar, 8.0)
        )
    attack = EncoderAttack(levels=personalization.LEVELS)
    checks = {"Mist's checkerboard": checkerboard(size, size, MistConfig(eps_levels=attack.levels).cell)}
    found += autoencoder.decoded_change(pipeline.vae, few, f"{len(few)} held-out photos", attack, checks)
    found += denoiser.losses(pipeline, load_photos(order.data, held_out=False, limit=order.photos), held_out)
    note("nano-sd: samples")
    drawn = denoiser.samples(pipeline, denoiser.CAPTIONS, 4, steps=50, guidance=5.0)
    denoiser.contact_sheet(drawn, denoiser.CAPTIONS, order.out / "samples.png")
    found.append(cost.advdm_step(model, images[:4], 10))
    found.append(cost.dreambooth(model, images[:4], "dog", DreamBooth.presets()["quick"]))
    return found + _personalization(order, size, note)


def _personalization(order: Evaluation, size: int, note: Note) -> list[Figure]:
    experiment = personalization.Experiment(
        model=order.folders[NANO_SD], embedder=order.folders[NANO_EMBED], dreambooth=DreamBooth.presets()["quick"]
    )
    subjects = personalization.load_subjects(order.subjects, size)
    note(f"nano-sd: personalization on {len(subjects)} subjects, three times each")

    def done(scores: personalization.Scores) -> None:
        after = "  ".join(f"{condition} {value:.3f}" for condition, value in scores.after.items())
        note(f"  {scores.subject}: before {scores.before:.3f}  {after}  real {scores.real:.3f}")

    store = order.out / "personalization.jsonl"
    scores = personalization.run(experiment, subjects, store, workers=order.workers, done=done)
    return [*personalization.personalization_figures(scores), *personalization.phenomenon_figures(scores)]


def evaluate_quick(folders: Mapping[str, Path], photos: Photos, out: Path) -> list[Figure]:
    """A look at all three models in a minute on a few photos, with few steps: does everything load and work?

    The figures have no bars, because they say little: the photos are few and other ones than the bars are for.
    """
    pipeline = load_pipeline(folders[NANO_SD])
    pipeline.vae.requires_grad_(False)
    size = 8 * pipeline.unet.config.sample_size
    images = _centres(photos, size)
    sample = f"{len(images)} photos"
    found = autoencoder.fidelity(pipeline.vae, images, sample, (None, None))
    attack = EncoderAttack(levels=8, steps=10)
    found += autoencoder.fragility(pipeline.vae, images[:4], "4 photos", attack, (None, None))
    drawn = denoiser.samples(pipeline, denoiser.CAPTIONS[:2], 2, steps=10, guidance=5.0)
    denoiser.contact_sheet(drawn, denoiser.CAPTIONS[:2], out / "samples.png")
    tile_model = load_pipeline(folders[NANO_DDPM], ModelKind.PIXEL)
    tiles = _centres(photos, tile_model.unet.config.sample_size)
    found += purification.figures(tile_model, tiles, sample, (10,), (10,))
    views, names = _two_views(photos)
    found += neighbours.figures(Embedder(folders[NANO_EMBED]), views, names, f"2 crops each of {sample}")
    bare = [replace(figure, at_least=None, at_most=None) for figure in found]
    write(bare, out / "evaluation.json")
    return bare


def _two_views(photos: Photos) -> tuple[Tensor, list[str]]:
    """Two crops of each photo, as if they were two photos of one subject."""
    rule = CropRule(128, scales=(0.6, 0.8))
    views = [random_crop(image, rule, (view, place)) for place, image in enumerate(photos.images) for view in (0, 1)]
    return torch.stack(views), [str(place) for place in range(len(photos)) for _ in (0, 1)]


def _centres(photos: Photos, size: int) -> Tensor:
    return torch.stack([centre_crop(image, size) for image in photos.images])
