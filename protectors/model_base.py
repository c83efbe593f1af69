"""The shape of every method that protects a model: a final ``protect`` around the method's own gradient."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar, final

import torch
from torch import Tensor

from protectors.concepts import CachedConcept, Concept, attacker_words, cache_concept, values_digest
from protectors.config import LATE, MethodConfig, require
from protectors.diffusion import DiffusionModel, LatentParts
from protectors.model_files import ModelError
from protectors.pgd import Progress
from protectors.protected_weights import ProtectedWeights
from protectors.randomness import SEED_LIMIT
from protectors.retention import CachedKept, Kept
from protectors.surrogate import FullSurrogate, check_surrogate

Curves = Mapping[str, tuple[float, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelProtectorConfig(MethodConfig):
    """Fields of every method that changes a model's weights."""

    # Updates of the protected weights for each concept; several concepts take turns.
    steps: int = 800
    # AdamW's learning rate for the protected weights.
    rate: float = 5e-6
    # Share of the updates, the last ones, over which the rate falls to 0 in a line; 0 keeps it constant.
    rate_decay: float = field(default=0.0, metadata=LATE)
    # The attacker's words for a subject; each simulated attack draws one.
    identifiers: tuple[str, ...] = ("sks",)
    # Prompts that he trains under, with {} for "sks dog" or, on class images, "dog"; each attack draws one.
    templates: tuple[str, ...] = ("a photo of {}",)
    # Class images that the model draws itself, under the first template. The positives come on top.
    class_images: int = 200
    # Crops of each photo that are trained on beside it, half of them mirrored: an attacker may have other photos.
    crops: int = field(default=0, metadata=LATE)
    # Networks run under autocast to bfloat16; weights, moments, gradients and losses stay float32.
    bf16: bool = False
    # Computes activations twice instead of keeping them: less memory, about a third more time.
    gradient_checkpointing: bool = False
    # Largest L2 norm of the gradient of one update; None leaves it.
    outer_clip: float | None = field(default=None, metadata=LATE)
    # Images are trained on as samples of the VAE's posterior, or as its mean.
    vae_sample: Literal["sample", "mode"] = field(default="sample", metadata=LATE)
    # The released code of APDM writes "a_photo_of_sks_dog" with the quotation marks. For comparison only.
    compat_prompts: bool = field(default=False, metadata=LATE)

    def check(self) -> None:
        MethodConfig.check(self)
        require(self.steps >= 1, "steps", self.steps, "use 1 or more")
        require(self.rate > 0, "rate", self.rate, "use more than 0")
        require(0 <= self.rate_decay <= 1, "rate_decay", self.rate_decay, "use 0 to 1")
        words = bool(self.identifiers) and all(word.strip() for word in self.identifiers)
        require(words, "identifiers", self.identifiers, "name at least one word")
        places = bool(self.templates) and all(text.count("{}") == 1 for text in self.templates)
        require(places, "templates", self.templates, "name at least one text with one {} in it")
        require(self.class_images >= 1, "class_images", self.class_images, "use 1 or more")
        require(self.crops >= 0, "crops", self.crops, "use 0 (none) or more")
        clip = self.outer_clip is None or self.outer_clip > 0
        require(clip, "outer_clip", self.outer_clip, "use more than 0, or None (off)")


ConfigT = TypeVar("ConfigT", bound=ModelProtectorConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What was done to the model."""

    seed: int
    steps: int
    """Updates of the protected weights, all concepts together."""
    curves: Curves
    """Mean of each logged value over every update, ``steps`` long; the names are the method's."""
    pairs: tuple[tuple[tuple[str, str], ...], ...]
    """Per concept: sha256 of each image (8 bit) and of the latents of the positive that goes with it."""
    drift: float
    """|| theta - phi ||_2 / || phi ||_2 over all weights of the UNet."""
    largest_change: float
    """Of any single weight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtectedModel:
    """The protected weights and how they came about."""

    weights: Mapping[str, Tensor]
    """The UNet's parameters by name, float32 on the CPU. VAE and text encoder are those of the model."""
    facts: ModelFacts
    positives: tuple[Tensor, ...]
    """Per concept, scaled latents ``(N, C, h, w)`` float32 on the CPU, in the order of ``facts.pairs``."""

    def on(self, model: DiffusionModel) -> DiffusionModel:
        """The model with these weights, in a UNet of its own; the other networks are shared, the given one stays.

        Its digest names both (it is not that of a folder with the same weights), so that nothing that is kept for the
        given model, such as images of a class, is taken for it.

        Raises:
            RuntimeError: the weights do not fit.
        """
        unet = copy.deepcopy(model.unet)
        unet.load_state_dict(self.weights, strict=True)
        parts = LatentParts(vae=model.vae, unet=unet, text_encoder=model.text_encoder, tokenizer=model.tokenizer)
        digest = hashlib.sha256(model.digest.encode())
        for name, weight in sorted(self.weights.items()):
            digest.update(name.encode() + weight.numpy().tobytes())
        return DiffusionModel(parts, model.schedule, digest=digest.hexdigest())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Study:
    """All that the updates of one call of ``protect`` share."""

    concepts: tuple[CachedConcept, ...]
    seed: int
    reference: DiffusionModel
    """The model as it was given, phi; its networks are never written to."""
    kept: CachedKept | None
    """Pictures of other things, for methods that hold on to what the model does on them."""
    copy: FullSurrogate
    """The UNet that the simulated attackers train, th: the given model's own, put back at the end."""
    memory: dict[str, Tensor] = field(default_factory=dict)
    """What the method keeps from update to update, by names of its own; checkpoints hold it."""

    @property
    def named(self) -> dict[str, Tensor]:
        """The parameters of ``copy`` by name, in its order."""
        return dict(self.copy.model.unet.named_parameters())

    def draw_seed(self, step: int) -> int:
        """The number that all random draws of one update follow from; so no generator needs be resumed."""
        return int.from_bytes(hashlib.sha256(f"{self.seed}/{step}".encode()).digest()[:8], "big")


class ModelProtector(ABC, Generic[ConfigT]):
    """Base of the methods that change a model so that it cannot be personalized on given concepts.

    A subclass sets the class attributes and writes ``_accumulate``; the updates, the guard against values that are
    not finite, checkpoints and the return of the given weights are here.

    Args:
        config: the method's own configuration; start from ``presets``.
        model: in float32. Its UNet is trained in place and put back, bit by bit, also after an exception.

    Raises:
        TypeError: the configuration is not of ``config_type``.
        ModelError: the model is no ``DiffusionModel``, or in half precision.
    """

    name: ClassVar[str]
    """The name in the registry."""
    version: ClassVar[str]
    """Raised whenever the same input and configuration give other weights."""
    config_type: ClassVar[type[ModelProtectorConfig]]
    presets: ClassVar[Mapping[str, ModelProtectorConfig]]
    """At least ``paper`` (faithful), ``fast`` (the embedded model on a CPU) and ``strong``."""

    def __init__(self, config: ConfigT, model: DiffusionModel) -> None:
        if not isinstance(config, self.config_type):
            raise TypeError(
                f"{self.name} takes a {self.config_type.__name__}, not a {type(config).__name__}; "
                f"start from {type(self).__name__}.presets"
            )
        if not isinstance(model, DiffusionModel):
            raise ModelError(f"{self.name} takes a model of class DiffusionModel, not {type(model).__name__}")
        check_surrogate("full", model)
        self.config = config
        self.model = model

    @final
    def protect(
        self,
        concepts: Sequence[Concept],
        *,
        seed: int,
        kept: Kept | None = None,
        progress: Progress | None = None,
        checkpoint: Path | None = None,
        checkpoint_every: int = 10,
    ) -> ProtectedModel:
        """Makes the model's UNet resist personalization on the concepts; the given model stays as it is.

        The order of a concept's images makes no difference; that of the concepts does.

        Args:
            concepts: one or more.
            seed: an unsigned 64-bit number; the same one gives the same weights on one kind of device.
            kept: pictures of other things, on which the model shall do as before, for methods that can use them.
            progress: called with (updates done, updates in all).
            checkpoint: folder of this run alone. What it holds is gone on with, and gives the very weights that an
                undisturbed run gives; afterwards it holds the last update.
            checkpoint_every: updates between two checkpoints.

        Raises:
            ValueError: bad input, pictures to keep for a method without use for them, or a checkpoint of another run.
            NotFiniteError: the training broke down.
        """
        if not 0 <= seed < SEED_LIMIT:
            raise ValueError(f"seed {seed} is no unsigned 64-bit number; use 0 to 2**64 - 1")
        if not concepts:
            raise ValueError("no concepts; name at least one")
        if checkpoint_every < 1:
            raise ValueError(f"checkpoint_every={checkpoint_every}: use 1 or more")
        with self._study(concepts, seed, kept) as study:
            protected, binding = self._begin(study), self._binding(study)
            if checkpoint is not None:
                protected.resume(checkpoint, binding)
            total = self.config.steps * len(concepts)
            while protected.done < total:
                study.copy.load(protected.weights)
                gradient = tuple(torch.zeros_like(weight) for weight in protected.weights)
                protected.update(gradient, self._accumulate(study, protected.done, gradient))
                if checkpoint is not None and (protected.done % checkpoint_every == 0 or protected.done == total):
                    protected.save(checkpoint, binding)
                if progress is not None:
                    progress(protected.done, total)
            return _result(study, protected)

    @abstractmethod
    def _accumulate(self, study: Study, step: int, gradient: tuple[Tensor, ...]) -> dict[str, float]:
        """Adds the gradient of one update to the buffers, which start at zero, one per parameter of ``study.copy``.

        ``study.copy`` holds the protected weights at the start, and may hold anything afterwards.

        Returns:
            Values to log, the same names in every update.
        """

    def _keeps(self, kept: Kept | None) -> CachedKept | None:
        """What the method holds on to, of the model as it is given."""
        if kept is not None:
            raise ValueError(f"{self.name}, with these settings, has no use for pictures to keep")
        return None

    def _trains(self, name: str) -> bool:
        """Whether the weight of this name is one that the method changes."""
        return True

    def _begin(self, study: Study) -> ProtectedWeights:
        named, config = study.named, self.config
        trained = [name for name in named if self._trains(name)]
        total = config.steps * len(study.concepts)
        return ProtectedWeights(
            named,
            rate=lambda done: config.rate * min(1.0, (total - done) / max(1.0, config.rate_decay * total)),
            trained=trained,
            clip=config.outer_clip,
            memory=study.memory,
        )

    @contextmanager
    def _study(self, concepts: Sequence[Concept], seed: int, kept: Kept | None) -> Iterator[Study]:
        cached_kept = self._keeps(kept)
        cached = tuple(self._cached(concept) for concept in concepts)
        reference = copy.copy(self.model)
        reference.unet = copy.deepcopy(self.model.unet)
        with FullSurrogate(self.model) as attacked, _checkpointed(self.model.unet, self.config.gradient_checkpointing):
            yield Study(concepts=cached, seed=seed, reference=reference, kept=cached_kept, copy=attacked)

    def _cached(self, concept: Concept) -> CachedConcept:
        config = self.config
        words = attacker_words(concept.class_word, config.identifiers, config.templates, compat=config.compat_prompts)
        cached = cache_concept(self.model, concept, words, class_images=config.class_images, crops_of_each=config.crops)
        if config.vae_sample == "sample":
            return cached
        mean, logvar = cached.moments
        # A posterior without any spread.
        return replace(cached, moments=(mean, torch.full_like(logvar, -torch.inf)))

    def _binding(self, study: Study) -> dict[str, str]:
        """What the weights follow from; a checkpoint with another one is refused."""
        facts = {"method": f"{self.name} {self.version}", "model": self.model.digest, "seed": str(study.seed)}
        # Class images too: where positives are given they alone tell a machine on which numbers come out otherwise.
        cached = [[one.class_word, one.pairs, values_digest(one.class_latents)] for one in study.concepts]
        concepts = json.dumps(cached).encode()
        fields = {name: json.dumps(value) for name, value in self.config.to_dict().items()}
        if study.kept is not None:
            facts["kept"] = study.kept.digest
        return {**facts, "concepts": hashlib.sha256(concepts).hexdigest(), **fields}


@contextmanager
def _checkpointed(unet: Any, wanted: bool) -> Iterator[None]:
    if wanted:
        unet.enable_gradient_checkpointing()
    try:
        yield
    finally:
        if wanted:
            unet.disable_gradient_checkpointing()


def _result(study: Study, protected: ProtectedWeights) -> ProtectedModel:
    weights = {name: weight.detach().cpu() for name, weight in zip(protected.names, protected.weights, strict=True)}
    # In float64: the change is small beside the weights.
    before = {name: weight.cpu().double() for name, weight in study.reference.unet.named_parameters()}
    changes = {name: weight.double() - before[name] for name, weight in weights.items()}
    facts = ModelFacts(
        seed=study.seed,
        steps=protected.done,
        # Sorted: after a resume they come in the order of the checkpoint's file.
        curves={name: tuple(curve) for name, curve in sorted(protected.curves.items())},
        pairs=tuple(concept.pairs for concept in study.concepts),
        drift=_norm(changes.values()) / _norm(before.values()),
        largest_change=max(float(change.abs().max()) for change in changes.values()),
    )
    return ProtectedModel(
        weights=weights, facts=facts, positives=tuple(concept.positives.cpu() for concept in study.concepts)
    )


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.square().sum()) for tensor in tensors))
