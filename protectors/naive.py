"""The objective that APDM's authors reject: drive the model away from the subject without measure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from protectors.dpo import squared_error
from protectors.learning_to_protect import LearningToProtect, LearningToProtectConfig, ProtectionLoss, Sample
from protectors.model_base import Study


@dataclass(frozen=True, slots=True, kw_only=True)
class NaiveConfig(LearningToProtectConfig):
    """Fields of ``LearningToProtectConfig``; without a simulated attack unless it is asked for."""

    inner_steps: int = 0


class Naive(LearningToProtect[NaiveConfig]):
    """Raises the denoising loss on the subject and lowers that on its class: a negative control.

    Section 4.1 of APDM, https://arxiv.org/abs/2511.01307: L = -L_simple(subject) + lambda L_ppl(class), descended;
    lambda is ``preservation_weight``.
    The loss on the subject has no upper bound, so that nothing makes it stop; the paper shows that the two terms do
    not converge together, and that images of other things suffer at every lambda.

    Distance: no image changes; of the model ``ModelFacts.drift`` and ``ModelFacts.largest_change``.

    Args:
        config: ``NaiveConfig``. The paper gives no numbers but that several lambda were tried; ``paper`` takes APDM's
            rate and as many gradients, 16,000.
        model: ``DiffusionModel`` in float32.

    Shape: images of concepts ``(N, 3, S, S)`` float32 in [0, 1] sRGB, S the model's base size.

    Returns:
        ``ProtectedModel``; curves "subject" (L_simple) and "prior" (L_ppl).

    Raises:
        ValueError: bad input or configuration. ModelError: the model is of another kind, or in half precision.
        NotFiniteError: the training broke down, which this one is likely to.

    Cost: per update 2 samples forward and backward.

    Differs from the paper: it gives no schedule; ``inner_steps`` above 0 puts this loss into APDM's simulated attacks.
    """

    name = "naive"
    version = "1"
    config_type = NaiveConfig
    presets: ClassVar[Mapping[str, NaiveConfig]] = {
        "paper": NaiveConfig(steps=16_000),
        "fast": NaiveConfig(steps=400, rate=2e-4, batch=4, class_images=32, templates=("a photo of a {}",)),
        "strong": NaiveConfig(inner_steps=20),
    }

    def _thirds(self) -> tuple[int, int]:
        return 1, 3

    def _loss(self, study: Study, sample: Sample) -> ProtectionLoss:
        subject, prior = squared_error(self.model, sample.latents, sample.embeddings, sample.draws).chunk(2)
        total = -subject.mean() + self.config.preservation_weight * prior.mean()
        return ProtectionLoss(total=total, parts={"subject": subject, "prior": prior})
