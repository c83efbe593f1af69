"""Our own protection of a model: APDM's simulated attacks, against anchors that the given model sets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from protectors.config import require
from protectors.learning_to_protect import (
    Attacker,
    GradientPoint,
    LearningToProtect,
    LearningToProtectConfig,
    ProtectionLoss,
    Sample,
)
from protectors.model_base import Study


@dataclass(frozen=True, slots=True, kw_only=True)
class AnchoredConfig(LearningToProtectConfig):
    """Fields of ``LearningToProtectConfig``, at what this method takes of it, and how far subjects are driven away."""

    inner_steps: int = 3
    gradient_point: GradientPoint = "last"
    attacker_text_encoder: bool = True
    # The anchors of the class are what preserves it.
    preservation_weight: float = 0.0
    attack_length: int = 160
    pairs_from: float = 0.5
    pair_source: Literal["fresh", "class"] = "class"
    crops: int = 8
    rate_decay: float = 0.3
    retention_weight: float = 10.0
    retention_by_error: float = 0.5
    kept_images: int = 160
    # How far beyond the given model's prediction an attacked model is asked to stay from the truth on the subject's
    # images, in units of the given model's own error; 0 asks for that prediction itself.
    repulsion: float = 4.0
    # Share of the weight of pairs that goes by the given model's own errors, as ``retention_by_error``.
    pairs_by_error: float = 1.0

    def check(self) -> None:
        LearningToProtectConfig.check(self)
        require(self.repulsion >= 0, "repulsion", self.repulsion, "use 0 or more")
        share = self.pairs_by_error
        require(0 <= share <= 1, "pairs_by_error", share, "use 0 to 1")
        require(self.retention_weight > 0, "retention_weight", self.retention_weight, "use more than 0")
        fix = "use 0: anchors preserve the class, and retention_weight all else"
        require(self.preservation_weight == 0, "preservation_weight", self.preservation_weight, fix)


_FAST = AnchoredConfig(
    steps=378,  # seven whole attacks
    rate=5e-4,
    attacker_rates=(2e-4,),
    batch=4,
    class_images=32,
    templates=("a photo of a {}",),
    one_pass=True,
)
_IDENTIFIERS = ("sks", "ktn", "t@t", "<subject>")
_ATTACKERS: tuple[Attacker, ...] = ("full", "lora", "cross_attention")


class Anchored(LearningToProtect[AnchoredConfig]):
    """Holds attacked models where the given one is, and a little beyond: they predict its class, never the subject.

    No paper; learning to protect is APDM's (https://arxiv.org/abs/2511.01307), and so is the pair. Where APDM prefers
    one error over another, here predictions have targets, which ends the training where it is done. With th an
    attacked model, p = e_phi(z_t, t, c) what the given one predicts and y the truth, under the attacker's prompt c,
    by his own text encoder where he trains it:

        L = mean w(t) (e_th(z+_t) - p+)^2 + mean w(t) (e_th(z-_t) - p- - gamma (p- - y-))^2,

    plus ``retention_weight`` times ``retention_loss`` at the protected weights themselves. z+ are images of the class
    that the given model draws, z- those of the subject, both in the noisier half of the schedule, where it is decided
    what a picture will show. Errors there are small, and the smaller the nearer to the noise (44 times from end to end
    of the schedule of nano-sd), so that w(t) makes them relative to the given model's own (``CachedKept.weights``);
    in retention the same keeps what the model draws, which a plain mean hardly sees. One attack lasts over many
    updates, so that gradients are taken far along it. Attacker and loss take ``crops`` of the photos too: without them
    a model held against the very photos that it was protected on, and not at all against others of the subject.

    Distance: no image changes; of the model ``ModelFacts.drift`` and ``ModelFacts.largest_change``.

    Args:
        config: ``AnchoredConfig``. ``fast`` is for the embedded model, and what was measured is in README.md. ``paper``
            has these settings at APDM's rates for Stable Diffusion; nobody has measured it. ``strong`` is ``paper``
            with several identifiers, prompts and kinds of attackers in turn; ``extended`` is ``fast`` with the same.
        model: ``DiffusionModel`` in float32.

    Shape: images of concepts ``(N, 3, S, S)`` float32 in [0, 1] sRGB, S the model's base size.

    Returns:
        ``ProtectedModel``; curves "personalization", "anchor" (first term), "repulsion" (second) and "retention".

    Raises:
        ValueError: bad input or configuration. ModelError: the model is of another kind, or in half precision.
        NotFiniteError: the training broke down.

    Cost: per update ``inner_steps`` steps of the attacker, and 2 b + ``retention_batch`` + 2 samples forward, and
        forward and backward; ``kept_images`` are drawn at the beginning.

    Differs from the paper: there is none. What it cannot do: whoever has the given weights is not hindered.
    """

    name = "anchored"
    version = "2"
    config_type = AnchoredConfig
    presets: ClassVar[Mapping[str, AnchoredConfig]] = {
        "paper": AnchoredConfig(attack_length=800),
        "fast": _FAST,
        "extended": _FAST.replace(
            identifiers=_IDENTIFIERS,
            templates=("a photo of a {}", "a photo of the {}", "a picture of a {}"),
            attackers=_ATTACKERS,
            attacker_rates=(2e-4, 2e-3, 2e-3),
        ),
        "strong": AnchoredConfig(
            attack_length=800,
            identifiers=_IDENTIFIERS,
            templates=("a photo of {}", "a photo of a {}", "a portrait of {}", "a picture of my {}"),
            attackers=_ATTACKERS,
            attacker_rates=(5e-6, 1e-4, 2e-5),
            steps=2400,
        ),
    }

    def _thirds(self) -> tuple[int, int]:
        return 0, 2

    def _loss(self, study: Study, sample: Sample) -> ProtectionLoss:
        draws = sample.draws
        noisy = self.model.add_noise(sample.latents, draws.noise, draws.t)
        with torch.no_grad():
            given = study.reference.predict(noisy, draws.t, sample.given)
            errors = given - self.model.target(sample.latents, draws.noise, draws.t)
        goals = given.chunk(2)[0], (given + self.config.repulsion * errors).chunk(2)[1]
        changes = (self.model.predict(noisy, draws.t, sample.embeddings) - torch.cat(goals)).square().flatten(1).mean(1)
        assert study.kept is not None  # the configuration has a retention_weight
        share, start = self.config.pairs_by_error, self.config.pairs_from
        weights = study.kept.weights(draws.t, self.model.schedule.timesteps, share=share, start=start)
        anchor, repulsion = (weights * changes).chunk(2)
        return ProtectionLoss(total=anchor.mean() + repulsion.mean(), parts={"anchor": anchor, "repulsion": repulsion})
