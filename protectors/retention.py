"""Retention: a protected model goes on predicting what the given one predicts, on pictures of other things.

The protection losses look at a subject and its class alone, so that all else drifts with them. Distilling the given
model's own predictions (Hinton et al., https://arxiv.org/abs/1503.02531) keeps it. Unlike the denoising loss on the
same pictures, the gradient is zero where nothing has changed, and trains nothing in.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from protectors.concepts import Words, check_images, image_digests, values_digest
from protectors.constraints import to_8bit
from protectors.diffusion import DiffusionModel
from protectors.dreambooth import class_latents
from protectors.objectives import draw_for, latent_denoising_loss
from protectors.randomness import streams

# Guidance holds a prediction against that without a prompt, so some rows go without.
_NO_PROMPT = 0.15
_AT_ONCE = 8
# Errors of the given model are estimated in so many parts of the schedule, from so many draws each.
_PARTS = 10
_DRAWS = 48


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Kept:
    """Pictures of other things, such as the model's users draw or teach it."""

    images: Tensor
    """``(K, 3, S, S)`` float32 in [0, 1], S the model's base size; cropping is the caller's."""
    prompts: tuple[str, ...]
    """What each shows; "" where nobody knows."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CachedKept:
    """Kept pictures ready for training, on the model's device."""

    latents: Tensor
    """Scaled, ``(K, C, h, w)``."""
    prompts: tuple[str, ...]
    digest: str
    """sha256 over all of them and their prompts."""
    errors: Tensor
    """Mean squared errors of the given model on them, in ten equal parts of the schedule from little noise to much."""

    def weights(self, t: Tensor, timesteps: int, *, share: float, start: float = 0.0) -> Tensor:
        """Weights of squared errors at timesteps t, ``(B,)``: ``1 - share + share E / E(t)``.

        E(t) is the given model's own error there and E its mean from the share ``start`` of the schedule on. With
        ``share`` 1 a change of the prediction counts relative to what the model misses anyway.
        """
        parts = len(self.errors)
        mean = self.errors[int(start * parts) :].mean()
        return 1 - share + share * mean / self.errors[t * parts // timesteps]


@torch.no_grad()
def cache_kept(model: DiffusionModel, kept: Kept | None, *, drawn: int) -> CachedKept:
    """Encodes the pictures; where none are given the model draws so many itself, without a prompt.

    Raises:
        ValueError: pictures of another size, or not in [0, 1], or not one prompt each.
    """
    if kept is None:
        latents, prompts = class_latents(model, "", drawn), ("",) * drawn
        names = [values_digest(latents)]
    else:
        check_images(model, kept.images)
        if len(kept.prompts) != len(kept.images):
            raise ValueError(
                f"{len(kept.images)} pictures to keep with {len(kept.prompts)} prompts; give one each, or ''"
            )
        images, prompts = to_8bit(kept.images.detach().to(model.device)), kept.prompts
        latents = torch.cat([model.mean_latents(part) for part in torch.split(images, _AT_ONCE)])
        names = image_digests(images)
    digest = hashlib.sha256("\n".join([*names, *prompts]).encode()).hexdigest()
    return CachedKept(latents=latents, prompts=prompts, digest=digest, errors=_errors(model, latents, prompts))


def _errors(model: DiffusionModel, latents: Tensor, prompts: tuple[str, ...]) -> Tensor:
    steps = model.schedule.timesteps
    (generator,) = streams([0], "errors")
    means = []
    for part in range(_PARTS):
        losses = []
        for places in torch.split(torch.randint(len(latents), (_DRAWS,), generator=generator), _AT_ONCE):
            bounds = (part * steps // _PARTS, (part + 1) * steps // _PARTS - 1)
            draws = draw_for(model, latents.shape[1:], [generator] * len(places), t_range=bounds)
            embeddings = model.embed_prompts([prompts[place] for place in places.tolist()])
            losses.append(latent_denoising_loss(model, latents[places], embeddings, draws))
        means.append(torch.cat(losses).mean())
    return torch.stack(means)


def retention_loss(
    model: DiffusionModel,
    reference: DiffusionModel,
    kept: CachedKept,
    general: Tensor,
    words: Words,
    *,
    batch: int,
    by_error: float,
    seed: int,
) -> Tensor:
    """Mean squared difference of the two models' predictions, one number with a graph; 0 where they are equal.

    Args:
        model: holds the protected weights.
        reference: as it was given.
        kept: ``batch`` of them are taken.
        general: of images of the class ``(M, C, h, w)``. One is taken under the class's prompt, and one under that of
            an attacker who has not trained anything yet.
        words: of the attacker.
        batch: how many of the kept ones.
        by_error: ``share`` of ``CachedKept.weights``.
        seed: of all draws.
    """
    (generator,) = streams([seed], "retention")
    others = torch.randint(len(kept.prompts), (batch,), generator=generator).tolist()
    classes = torch.randint(len(general), (2,), generator=generator).tolist()
    prompts = [*(kept.prompts[place] for place in others), words.general, words.instance]
    bare = (torch.rand(len(prompts), generator=generator) < _NO_PROMPT).tolist()
    embeddings = model.embed_prompts(["" if without else prompt for prompt, without in zip(prompts, bare, strict=True)])
    latents = torch.cat([kept.latents[others], general[classes]])
    draws = draw_for(model, latents.shape[1:], [generator] * len(latents))
    with torch.no_grad():
        before = reference.predict(model.add_noise(latents, draws.noise, draws.t), draws.t, embeddings)
    weights = kept.weights(draws.t, model.schedule.timesteps, share=by_error)
    return (weights * latent_denoising_loss(model, latents, embeddings, draws, target=before)).mean()
