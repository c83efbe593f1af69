"""Does personalization work on nano-sd, and does a perturbation hinder it while noise does not?"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.laboratory.figures import Figure, bootstrap_interval, bootstrap_ratio
from pipeline.verify.attack_models import load_pipeline
from pipeline.verify.customizers.base import PHOTO, PriorImages, sample
from pipeline.verify.customizers.dreambooth import DreamBooth
from pipeline.verify.embed import Embedder, mean_similarity, mean_similarity_among
from protectors.constraints import to_8bit
from protectors.diffusion import load_model
from protectors.mist import Mist, MistConfig
from protectors.model_files import model_digest
from protectors.randomness import streams
from protectors.reference.data import centre_crop, decode_photo, read_columns

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

    @property
    def photos(self) -> Tensor:
        """All of them, `(n + m, 3, S, S)`."""
        return torch.cat([self.train, self.others])


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """What is done with each subject."""

    model: Path
    embedder: Path
    dreambooth: DreamBooth
    # Also personalize on photos with uniform noise and on protected ones, both of `LEVELS` levels.
    conditions: tuple[str, ...] = (CLEAN, NOISE, PROTECTED)
    generated: int = 32
    protector_steps: int = 100
    seed: int = 0

    def protector_config(self) -> MistConfig:
        """Of the protection under test: Mist as published, at this experiment's budget and steps."""
        return Mist.presets["paper"].replace(eps_levels=LEVELS, steps=self.protector_steps)

    def fingerprint(self, subject: Subject) -> str:
        """Names all that a subject's scores depend on but library versions, so that no others are taken for them."""
        embedder = hashlib.sha256()
        for file in sorted((*self.embedder.glob("*.json"), *self.embedder.glob("*.safetensors"))):
            embedder.update(file.name.encode() + file.read_bytes())
        photos = [hashlib.sha256(side.numpy().tobytes()).hexdigest() for side in (subject.train, subject.others)]
        facts = asdict(self) | {
            "model": model_digest(str(self.model)),
            "embedder": embedder.hexdigest(),
            "subject": [subject.name, subject.class_word, *photos],
            "protector": [Mist.version, self.protector_config().canonical_json()],
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
    table = read_columns(parquet, ("asset_id", "image", "subject", "subject_class"))
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(table.to_pylist(), key=lambda row: row["asset_id"]):
        groups.setdefault(row["subject"], []).append(row)
    subjects = []
    for name, rows in sorted(groups.items()):
        if len(rows) < 2:
            raise ValueError(f"{parquet}: subject {name!r} has one photo; it needs one to train on and one to compare")
        images = torch.stack([centre_crop(decode_photo(row["image"]["bytes"], row["asset_id"]), size) for row in rows])
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
    keys = {subject.name: experiment.fingerprint(subject) for subject in subjects}
    found = _read(store, keys)
    missing = [subject for subject in subjects if subject.name not in found]
    store.parent.mkdir(parents=True, exist_ok=True)
    for scores in _measured(experiment, missing, workers):
        with store.open("a") as out:
            out.write(json.dumps({"experiment": keys[scores.subject], **asdict(scores)}) + "\n")
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


def _read(store: Path, keys: Mapping[str, str]) -> dict[str, Scores]:
    if not store.exists():
        return {}
    rows = [json.loads(line) for line in store.read_text().splitlines()]
    return {row["subject"]: Scores(**row) for row in rows if row.pop("experiment") == keys.get(row["subject"])}


def measure(experiment: Experiment, subject: Subject) -> Scores:
    """Personalizes on one subject under every condition and compares what is generated with its other photos."""
    attack = experiment.dreambooth
    # Each subject has its own draws; its conditions share them.
    seed = int.from_bytes(hashlib.sha256(f"{experiment.seed}/{subject.name}".encode()).digest()[:4], "big")
    embedder = Embedder(experiment.embedder)
    others = embedder.embed(subject.others)
    base = load_pipeline(experiment.model)
    priors = PriorImages(base)
    prompt = PHOTO.format(attack.subject(subject.class_word))

    def similarity(pipeline: Any) -> float:
        images = sample(pipeline, prompt, experiment.generated, seed=seed, sampling=attack.sampling)
        return mean_similarity(embedder.embed(images), others)

    after = {}
    for condition in experiment.conditions:
        images = _treated(experiment, subject, condition, seed)
        customized = attack.customize(base, images, subject.class_word, seed=seed, priors=priors)
        after[condition] = similarity(customized.pipeline)
    return Scores(
        subject=subject.name,
        before=similarity(base),
        real=mean_similarity_among(embedder.embed(subject.photos)),
        after=after,
    )


def _treated(experiment: Experiment, subject: Subject, condition: str, seed: int) -> Tensor:
    images = to_8bit(subject.train)
    if condition == CLEAN:
        return images
    if condition == NOISE:
        (generator,) = streams([seed], "laboratory/noise")
        noise = (torch.rand(images.shape, generator=generator) * 2 - 1) * (LEVELS / 255)
        return to_8bit((images + noise).clamp(0, 1))
    protector = Mist(experiment.protector_config(), load_model(str(experiment.model)))
    prompts = [PHOTO.format(subject.class_word)] * len(images)
    result = protector.protect(images, prompts=prompts, seeds=[seed + place for place in range(len(images))])
    if failed := [fact.failed for fact in result.facts if fact.failed]:
        raise RuntimeError(f"{subject.name} could not be protected: {failed[0]}")
    return result.images


def personalization_figures(scores: Sequence[Scores]) -> list[Figure]:
    """How many subjects personalization works for, and how far it goes."""
    gains = [score.gain(CLEAN) for score in scores]
    room = [score.real - score.before for score in scores]
    share, low, high = _ratio(gains, room)
    sample = f"{len(scores)} subjects"
    return [
        Figure(
            model=MODEL,
            name=f"DreamBooth: subjects whose similarity rises, of {len(scores)}",
            value=sum(gain > 0 for gain in gains),
            sample=sample,
            at_least=math.ceil(0.8 * len(scores)),
        ),
        Figure(
            model=MODEL,
            name="DreamBooth: mean rise as a share of the way from before to real",
            value=share,
            low=low,
            high=high,
            sample=sample,
            at_least=0.40,
            sound=math.isfinite(low),
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
    """By what share the gain of personalization falls, for protected photos and for noisy ones, paired by subject.

    Neither counts for its bar with fewer than ten subjects, or where personalization on clean photos gains nothing
    that could fall; the protection's fall counts if its whole interval is above zero.
    """
    clean = [score.gain(CLEAN) for score in scores]
    sample = f"{len(scores)} subjects, paired"
    found = []
    for condition, what in ((PROTECTED, "a fused perturbation"), (NOISE, "uniform noise")):
        losses = [score.gain(CLEAN) - score.gain(condition) for score in scores]
        value, low, high = _ratio(losses, clean)
        sound = len(scores) >= 10 and bootstrap_interval(clean)[0] > 0 and (condition == NOISE or low > 0)
        name = f"fall of the gain by {what} of {LEVELS} levels"
        found.append(
            Figure(
                model=MODEL,
                name=name,
                value=value,
                low=low,
                high=high,
                sample=sample,
                at_least=0.30 if condition == PROTECTED else None,
                at_most=0.10 if condition == NOISE else None,
                sound=sound,
            )
        )
    return found


def _ratio(above: Sequence[float], below: Sequence[float]) -> tuple[float, float, float]:
    """Ratio of the sums with its interval; not a number where there is nothing to be a share of."""
    value = sum(above) / sum(below) if sum(below) > 0 else math.nan
    return value, *bootstrap_ratio(above, below)
