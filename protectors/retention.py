"""Retention: a protected model goes on predicting what the given one predicts, on pictures of other things.

The protection losses look at a subject and its class alone, so that all else drifts with them. Distilling the given
model's own predictions (Hinton et al., https://arxiv.org/abs/1503.02531) on pictures that it draws itself keeps it.
Unlike the denoising loss on them, the gradient is zero where nothing has changed, and trains nothing in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from protectors.concepts import Words
from protectors.diffusion import DiffusionModel
from protectors.objectives import draw_for, latent_denoising_loss
from protectors.randomness import streams

# Guidance holds a prediction against that without a prompt, so some images of the class go without.
_NO_PROMPT = 0.15


def retention_loss(
    model: DiffusionModel,
    reference: DiffusionModel,
    kept: Tensor,
    general: Tensor,
    words: Words,
    *,
    batch: int,
    seed: int,
) -> Tensor:
    """Mean squared difference of the two models' predictions, one number with a graph; 0 where they are equal.

    Args:
        model: holds the protected weights.
        reference: as it was given.
        kept: scaled latents ``(K, C, h, w)`` of pictures that it drew without a prompt; ``batch`` of them are taken,
            without a prompt.
        general: of images of the class ``(M, C, h, w)``. One is taken under the class's prompt, and one under that of
            an attacker who has not trained anything yet.
        words: of the attacker.
        batch: how many of the kept ones.
        seed: of all draws.
    """
    (generator,) = streams([seed], "retention")
    others = kept[torch.randint(len(kept), (batch,), generator=generator)]
    classes = general[torch.randint(len(general), (2,), generator=generator)]
    bare = (torch.rand(2, generator=generator) < _NO_PROMPT).tolist()
    named = ["" if without else prompt for prompt, without in zip((words.general, words.instance), bare, strict=True)]
    latents, embeddings = torch.cat([others, classes]), model.embed_prompts([""] * batch + named)
    draws = draw_for(model, latents.shape[1:], [generator] * len(latents))
    with torch.no_grad():
        before = reference.predict(model.add_noise(latents, draws.noise, draws.t), draws.t, embeddings)
    return latent_denoising_loss(model, latents, embeddings, draws, target=before).mean()
