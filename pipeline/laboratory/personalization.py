"""Does personalization work on nano-sd, and does a perturbation hinder it while noise does not?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import pyarrow.parquet as pq
import torch
from torch import Tensor

from pipeline.laboratory.figures import Figure, bootstrap_interval, bootstrap_ratio
from pipeline.verify.customize import DreamBooth, DreamBoothConfig, load_pipeline
from pipeline.verify.embed import Embedder, mean_similarity, mean_similarity_among
from protectors.diffusion import load_model
from protectors.mist import Mist
from protectors.model_files import model_digest
from protectors.reference.data import centre_crop, decode_photo

MODEL = "nano-sd"
CLEAN, NOISE, PROTECTED = "clean", "noise", "protected"
LEVELS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """Photos of one thing: some to personalize on, the others to compare with."""

    name: str
    class_word: str
    train: Tensor  # (n, 3, S, S) in [0, 1]
    others: Tensor  # (m, 3, S, S); photos of the subject that no customization sees


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """What is done with each subject."""

    model: Path
    embedder: Path
    dreambooth: DreamBoothConfig
    # Also personalize on photos with uniform noise and on protected ones, both of `LEVELS` levels.
    conditions: tuple[str, ...] = (CLEAN, NOISE, PROTECTED)
    generated: int = 32
    protector_steps: int = 100
    seed: int = 0

    def fingerprint(self) -> str:
        """Names everything that the scores depend on, so that stored scores of another experiment are not taken."""
        facts = asdict(self) | {
            "model": model_digest(str(self.model)),
            "embedder": hashlib.sha256((self.embedder / "model.safetensors").read_bytes()).hexdigest(),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Mean cosine similarities of one subject to its photos in `others`."""

    subject: str
    before: float
    """Images of the base model under the subject's prompt."""
    real: float
    """Real photos among themselves: the ceiling."""
    after: dict[str, float]
    """Images of the customized model, by condition."""

    def gain(self, condition: str) -> float:
        """What personalization won."""
        return self.after[condition] - self.before


def load_subjects(parquet: Path, size: int, *, train: int = 4) -> list[Subject]:
    """Reads subjects in alphabetical order; of each at most `train` photos to train on, the rest to compare with.

    Raises:
        ValueError: a subject has fewer than two photos.
    """
    table = pq.read_table(parquet, columns=["asset_id", "image", "subject", "subject_class"])
    groups: dict[str, list[dict[str, object]]] = {}
    for row in sorted(table.to_pylist(), key=lambda row: row["asset_id"]):
        groups.setdefault(row["subject"], []).append(row)
    subjects = []
    for name, rows in sorted(groups.items()):
        if len(rows) < 2:
            raise ValueError(f"{parquet}: subject {name!r} has one photo; it needs one to train on and one to compare")
        images = torch.stack([centre_crop(decode_photo(row["image"]["bytes"]), size) for row in rows])  # type: ignore[index]
        cut = min(train, len(rows) - 1)
        word = str(rows[0]["subject_class"])
        subjects.append(Subject(name=name, class_word=word, train=images[:cut], others=images[cut:]))
    return subjects


def run(
    experiment: Experiment,
    subjects: Sequence[Subject],
    store: Path,
    *,
    workers: int,
    done: Callable[[Scores], None] = lambda scores: None,
) -> list[Scores]:
    """Measures every subject; results in the subjects' order.

    With `workers` above 1 they are measured in as many processes of one thread each, else in this process.
    Scores are stored in `store`, one JSON per line, as they come; a later run of the same experiment takes them
    from there, so that an interrupted evaluation goes on.
    """
    key = experiment.fingerprint()
    found = _read(store, key)
    missing = [subject for subject in subjects if subject.name not in found]
    store.parent.mkdir(parents=True, exist_ok=True)
    for scores in _measured(experiment, missing, workers):
        with store.open("a") as out:
            out.write(json.dumps({"experiment": key, **asdict(scores)}) + "\n")
        found[scores.subject] = scores
        done(scores)
    return [found[subject.name] for subject in subjects]


def _measured(experiment: Experiment, subjects: Sequence[Subject], workers: int) -> Iterator[Scores]:
    if workers == 1 or len(subjects) < 2:
        yield from (measure(experiment, subject) for subject in subjects)
        return
    # Spawned, because a forked child of a process with torch's threads can hang.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_one_thread) as pool:
        yield from pool.map(measure, [experiment] * len(subjects), subjects)


def _one_thread() -> None:
    torch.set_num_threads(1)


def _read(store: Path, key: str) -> dict[str, Scores]:
    if not store.exists():
        return {}
    rows = [json.loads(line) for line in store.read_text().splitlines()]
    return {row["subject"]: Scores(**row) for row in rows if row.pop("experiment") == key}


def measure(experiment: Experiment, subject: Subject) -> Scores:
    """Personalizes on one subject under every condition and compares what is generated with its other photos."""
    config, seed = experiment.dreambooth, experiment.seed
    embedder = Embedder(experiment.embedder)
    others = embedder.embed(subject.others)
    attack = DreamBooth(load_pipeline(experiment.model), config)
    prompt = config.subject_prompt(subject.class_word)

    def similarity(images: Tensor) -> float:
        return mean_similarity(embedder.embed(images), others)

    after = {}
    for condition in experiment.conditions:
        customized = attack.customize(_treated(experiment, subject, condition), subject.class_word, seed=seed)
        after[condition] = similarity(attack.sample(customized, prompt, experiment.generated, seed=seed))
    return Scores(
        subject=subject.name,
        before=similarity(attack.sample(attack.pipeline, prompt, experiment.generated, seed=seed)),
        real=mean_similarity_among(embedder.embed(torch.cat([subject.train, subject.others]))),
        after=after,
    )


def _treated(experiment: Experiment, subject: Subject, condition: str) -> Tensor:
    images = (subject.train * 255).round() / 255
    if condition == CLEAN:
        return images
    if condition == NOISE:
        generator = torch.Generator().manual_seed(experiment.seed)
        noise = (torch.rand(images.shape, generator=generator) * 2 - 1) * (LEVELS / 255)
        return ((images + noise).clamp(0, 1) * 255).round() / 255
    config = Mist.presets["paper"].replace(eps_levels=LEVELS, steps=experiment.protector_steps)
    protector = Mist(config, load_model(str(experiment.model)))
    prompts = [f"a photo of a {subject.class_word}"] * len(images)
    return protector.protect(images, prompts=prompts, seeds=range(len(images))).images


def personalization_figures(scores: Sequence[Scores]) -> list[Figure]:
    """How many subjects personalization works for, and how far it goes."""
    gains = [score.gain(CLEAN) for score in scores]
    room = [score.real - score.before for score in scores]
    share = sum(gains) / sum(room)
    low, high = bootstrap_ratio(gains, room)
    sample = f"{len(scores)} subjects"
    return [
        Figure(
            model=MODEL,
            name=f"DreamBooth: subjects whose similarity rises, of {len(scores)}",
            value=sum(gain > 0 for gain in gains),
            sample=sample,
            at_least=round(0.8 * len(scores)),
        ),
        Figure(
            model=MODEL,
            name="DreamBooth: mean rise as a share of the way from before to real",
            value=share,
            low=low,
            high=high,
            sample=sample,
            at_least=0.40,
        ),
        *_levels(scores, sample),
    ]


def _levels(scores: Sequence[Scores], sample: str) -> Iterable[Figure]:
    for name, values in (
        ("before", [score.before for score in scores]),
        ("after", [score.after[CLEAN] for score in scores]),
        ("real photos among themselves", [score.real for score in scores]),
    ):
        low, high = bootstrap_interval(values)
        mean = sum(values) / len(values)
        name = f"nano-embed similarity, {name}"
        yield Figure(model=MODEL, name=name, value=mean, low=low, high=high, sample=sample)


def phenomenon_figures(scores: Sequence[Scores]) -> list[Figure]:
    """By what share the gain of personalization falls, for protected photos and for noisy ones, paired by subject."""
    clean = [score.gain(CLEAN) for score in scores]
    sample = f"{len(scores)} subjects, paired"
    found = []
    for condition, what in ((PROTECTED, "a fused perturbation"), (NOISE, "uniform noise")):
        losses = [score.gain(CLEAN) - score.gain(condition) for score in scores]
        low, high = bootstrap_ratio(losses, clean)
        name = f"fall of the gain by {what} of {LEVELS} levels"
        value = sum(losses) / sum(clean)
        bars = {"at_least": 0.30} if condition == PROTECTED else {"at_most": 0.10}
        found.append(Figure(model=MODEL, name=name, value=value, low=low, high=high, sample=sample, **bars))
    return found
