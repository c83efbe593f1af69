"""APDM (Lee et al., NeurIPS 2025, https://arxiv.org/abs/2511.01307): a model on which a subject cannot be learnt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from protectors.config import require
from protectors.dpo import PairErrors, Reduction, dpo_loss, preference_margin, squared_error
from protectors.learning_to_protect import LearningToProtect, LearningToProtectConfig, ProtectionLoss, Sample
from protectors.model_base import Study


@dataclass(frozen=True, slots=True, kw_only=True)
class APDMConfig(LearningToProtectConfig):
    """Fields of ``LearningToProtectConfig`` and the form of the preference loss."""

    # How soon a pair counts as won; larger stays nearer to the given model. Read it together with the reduction.
    beta: float = 1.0
    # What is inside of the sigmoid, see ``dpo_loss``.
    dpo_reduction: Reduction = "element"

    def check(self) -> None:
        LearningToProtectConfig.check(self)
        require(self.beta > 0, "beta", self.beta, "use more than 0")


_FAST = APDMConfig(
    steps=60,
    rate=2e-4,
    inner_steps=10,
    attacker_rates=(2e-4,),
    batch=4,
    class_images=32,
    templates=("a photo of a {}",),
)
_IDENTIFIERS = ("sks", "ktn", "t@t", "<subject>")


class APDM(LearningToProtect[APDMConfig]):
    """Anti-Personalized Diffusion Model: prefers generic images to the subject's, along simulated attacks.

    "Perturb a Model, Not an Image: Towards Robust Privacy Protection via Anti-Personalized Diffusion Models",
    https://arxiv.org/abs/2511.01307, section 4, algorithm 1. theta = phi, the given UNet; for each update th = theta,
    and N_per times: th takes an AdamW step on L_per = L_simple(subject) + w L_ppl(class), then
    g += grad L_protect(th); at last theta takes a step of its own AdamW with g.
    L_protect = L_dpo + w_p L_ppl, L_dpo = -log sigmoid(-beta (r+ - r-)), r = se(th, z, t, c) - se(phi, z, t, c) for
    a generic image z+ and an image of the subject z-, both at one t and noise and under c = "a photo of sks dog".

    Distance: no image changes; of the model ``ModelFacts.drift`` and ``ModelFacts.largest_change``.

    Args:
        config: ``APDMConfig``. The ``paper`` preset has its numbers: 800 updates, N_per = 20, AdamW with 5e-6 for
            both (betas 0.9 and 0.999, weight decay 0.01), beta = w = w_p = 1, batch 1, float32, 200 class images,
            "a photo of sks person"; the sigmoid is taken of each element, as in the released code. ``fast`` is for
            the embedded model, whose attackers need about 40 times the rate. ``strong`` is ``paper`` extended by what
            the paper has not: each simulated attack draws one of several identifiers and prompts, and attackers who
            train all weights, low-rank deltas, and keys and values of cross-attention take turns. ``extended`` is
            ``fast`` extended in the same way and by nothing else, so that what it brings can be measured; ``strong``
            takes 1200 updates, 400 with each attacker.
        model: ``DiffusionModel`` in float32.

    Shape: images of concepts ``(N, 3, S, S)`` float32 in [0, 1] sRGB, S the model's base size.

    Returns:
        ``ProtectedModel``; curves "personalization", "dpo", "margin" (mean r+ - r-) and "prior", one mean per update.

    Raises:
        ValueError: bad input or configuration. ModelError: the model is of another kind, or in half precision.
        NotFiniteError: the training broke down.

    Cost: per inner step 5 samples forward and backward with weight gradients and 2 forward; no pass of VAE or text
        encoder. The weights four times (given, attacked, protected, and those put back at the end, on the CPU), two
        sets of gradients and two of moments. The paper: about 9 hours on an RTX A6000.

    Differs from the paper: an attacker's instance and class image have a timestep each where the released code shares
        it (``t_sharing``); every simulated attack shuffles its images anew. Class images and drawn positives are
        latents that were never decoded. What it cannot do: whoever has the given weights is not hindered.
    """

    name = "apdm"
    version = "1"
    config_type = APDMConfig
    presets: ClassVar[Mapping[str, APDMConfig]] = {
        "paper": APDMConfig(one_pass=True),
        "fast": _FAST,
        "extended": _FAST.replace(
            identifiers=_IDENTIFIERS,
            templates=("a photo of a {}", "a photo of the {}", "a picture of a {}"),
            attackers=("full", "lora", "cross_attention"),
            # Those at which the quick customizers personalize the embedded model.
            attacker_rates=(2e-4, 2e-3, 2e-3),
        ),
        "strong": APDMConfig(
            identifiers=_IDENTIFIERS,
            templates=("a photo of {}", "a photo of a {}", "a portrait of {}", "a picture of my {}"),
            attackers=("full", "lora", "cross_attention"),
            attacker_rates=(5e-6, 1e-4, 2e-5),
            steps=1200,
            one_pass=True,
        ),
    }

    def _thirds(self) -> tuple[int, int]:
        return (0, 3) if self.config.preservation_weight > 0 else (0, 2)

    def _loss(self, study: Study, sample: Sample) -> ProtectionLoss:
        config = self.config
        errors = squared_error(self.model, sample.latents, sample.embeddings, sample.draws)
        positive, negative, *prior = torch.split(errors, config.batch)
        pairs = sample.rows(0, 2) if prior else sample
        with torch.no_grad():
            before = squared_error(study.reference, pairs.latents, pairs.given, pairs.draws).chunk(2)
        margin = preference_margin(
            PairErrors(positive=positive, negative=negative), PairErrors(positive=before[0], negative=before[1])
        )
        dpo = dpo_loss(margin, beta=config.beta, reduction=config.dpo_reduction)
        parts = {"dpo": dpo, "margin": margin}
        if not prior:
            return ProtectionLoss(total=dpo, parts=parts)
        total = dpo + config.preservation_weight * prior[0].mean()
        return ProtectionLoss(total=total, parts={**parts, "prior": prior[0]})
