"""IMMA (Zheng and Yeh, ECCV 2024, https://arxiv.org/abs/2311.18815): a model that adaptations begin badly from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from protectors.config import require
from protectors.dpo import squared_error
from protectors.learning_to_protect import LearningToProtect, LearningToProtectConfig, ProtectionLoss, Sample
from protectors.model_base import Study


@dataclass(frozen=True, slots=True, kw_only=True)
class IMMAConfig(LearningToProtectConfig):
    """Fields of ``LearningToProtectConfig``: one step of the adaptation per update, without images of the class."""

    steps: int = 1000
    rate: float = 2e-5
    inner_steps: int = 1
    # The adaptation goes on from update to update.
    inner_state_reset: Literal["fresh", "carried"] = "carried"
    # The method trains on images of the subject alone; above 0 these two are additions.
    prior_weight: float = 0.0
    preservation_weight: float = 0.0
    # At these weights they are drawn and not used.
    class_images: int = 1
    # Which weights the protection may change: the cross-attention layers, or all.
    immunized: Literal["cross_attention", "all"] = "cross_attention"

    def check(self) -> None:
        LearningToProtectConfig.check(self)
        require(
            self.inner_steps >= 1, "inner_steps", self.inner_steps, "use 1 or more: naive is what has no adaptation"
        )


class IMMA(LearningToProtect[IMMAConfig]):
    """Immunizes a model: raises the loss that an adaptation to the subject has after each of its steps.

    "IMMA: Immunizing text-to-image Models against Malicious Adaptation", https://arxiv.org/abs/2311.18815, section 4:
    max over theta of L_A(x, c; theta, phi*), with phi* = argmin over phi of L_A(x', c; theta, phi). L_A is the
    adaptation's own loss (DreamBooth's on the subject, without images of the class) and phi what it trains: all
    weights, keys and values of cross-attention, or low-rank deltas. The two are alternated: a step of phi down L_A,
    then a step of theta, the cross-attention layers, up L_A at the new phi, on other images and draws.

    Distance: no image changes; of the model ``ModelFacts.drift`` and ``ModelFacts.largest_change``.

    Args:
        config: ``IMMAConfig``. The ``paper`` preset has the numbers that the authors publish for DreamBooth with their
            code: 1000 updates with 2e-5, one step of the adaptation with 5e-6 in each, batch 1. ``fast`` is for the
            embedded model, at a rate that leaves other classes nearly as they are; twice that rate does not.
            ``strong`` simulates three adaptations in turn.
        model: ``DiffusionModel`` in float32.

    Shape: images of concepts ``(N, 3, S, S)`` float32 in [0, 1] sRGB, S the model's base size.

    Returns:
        ``ProtectedModel``; curves "personalization" (L_A before a step of phi) and "adaptation" (L_A after it),
        and "prior" where ``preservation_weight`` is above 0.

    Raises:
        ValueError: bad input or configuration. ModelError: the model is of another kind, or in half precision.
        NotFiniteError: the training broke down, which a loss without upper bound can come to.

    Cost: per update 2 samples forward and backward. The weights four times, as with ``APDM``.

    Differs from the paper: these are our readings: gradients are of first order, as if phi did not depend on theta;
        where phi is a part of theta it begins at theta in each update, while low-rank deltas and AdamW's moments go
        on; both levels take AdamW steps (weight decay 0.01). Textual inversion is not simulated, and ``strong`` is
        not the authors': they immunize against one adaptation. What it cannot do: whoever has the given weights is
        not hindered, and nothing keeps the class of the subject as it is.
    """

    name = "imma"
    version = "1"
    config_type = IMMAConfig
    presets: ClassVar[Mapping[str, IMMAConfig]] = {
        "paper": IMMAConfig(),
        "fast": IMMAConfig(steps=400, rate=5e-5, attacker_rates=(2e-4,), batch=4, templates=("a photo of a {}",)),
        "strong": IMMAConfig(
            steps=3000, attackers=("full", "lora", "cross_attention"), attacker_rates=(5e-6, 1e-4, 2e-5)
        ),
    }

    def _trains(self, name: str) -> bool:
        return self.config.immunized == "all" or ".attn2." in name

    def _thirds(self) -> tuple[int, int]:
        return (1, 3) if self.config.preservation_weight > 0 else (1, 2)

    def _loss(self, study: Study, sample: Sample) -> ProtectionLoss:
        config = self.config
        errors = squared_error(self.model, sample.latents, sample.embeddings, sample.draws)
        adaptation, prior = errors[: config.batch], errors[config.batch :]
        if config.preservation_weight == 0:
            return ProtectionLoss(total=-adaptation.mean(), parts={"adaptation": adaptation})
        total = -adaptation.mean() + config.preservation_weight * prior.mean()
        return ProtectionLoss(total=total, parts={"adaptation": adaptation, "prior": prior})
