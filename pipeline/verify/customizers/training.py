"""The training that all customization attacks share: denoising loss on cached latents, in a copy of the base."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.verify.customizers.base import PHOTO, Customizer, PriorImages
from protectors.randomness import streams
from protectors.schedule import NoiseSchedule

_ENCODED_TOGETHER = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """Latents under their prompts. An update draws rows with equal chances, so an augmentation is further rows.

    Shape: `latents` and `spread` scaled `(N, C, h, w)`; `tokens` `(N, L)` int64; `valid` `(N, 1, h, w)` in {0, 1}.
    """

    latents: Tensor
    # Standard deviation of the VAE's posterior, which every update samples anew; None for latents without one.
    spread: Tensor | None
    tokens: Tensor
    # Where the loss is taken.
    valid: Tensor
    # Of its mean loss in the sum over lessons.
    weight: float = 1.0

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, tokens and validity of `count` rows, with replacement."""
        rows = torch.randint(0, len(self.latents), (count,), generator=generator)
        latents = self.latents[rows]
        if self.spread is not None:
            latents = latents + self.spread[rows] * torch.randn(latents.shape, generator=generator).to(latents.device)
        return latents, self.tokens[rows], self.valid[rows]


def own_copy(base: Any) -> Any:
    """A pipeline with its own UNet, text encoder and tokenizer, frozen; the VAE is shared: no attack trains it."""
    own = copy.copy(base)
    parts = {name: copy.deepcopy(getattr(base, name)) for name in ("unet", "text_encoder", "tokenizer")}
    own.register_modules(**parts)
    own.unet.requires_grad_(False).eval()
    own.text_encoder.requires_grad_(False).eval()
    return own


def subject_lesson(pipeline: Any, images: Tensor, prompts: Sequence[str], valid: Tensor | None = None) -> Lesson:
    """Encodes photos once: the VAE is frozen.

    Args:
        pipeline: whose VAE and tokenizer are used.
        images: `(N, 3, S, S)` in [0, 1].
        prompts: one per image.
        valid: `(N, 1, h, w)` of the latents' size, 1 where the loss is taken; everywhere by default.
    """
    device, scale = pipeline.device, float(pipeline.vae.config.scaling_factor)
    with torch.no_grad():
        parts = [
            pipeline.vae.encode((part * 2 - 1).to(device)).latent_dist
            for part in torch.split(images, _ENCODED_TOGETHER)
        ]
    latents = torch.cat([part.mean for part in parts]) * scale
    return Lesson(
        latents=latents,
        spread=torch.cat([part.std for part in parts]) * scale,
        tokens=_tokens(pipeline, prompts),
        valid=torch.ones_like(latents[:, :1]) if valid is None else valid.to(device),
    )


def prior_lesson(
    priors: PriorImages, class_word: str, count: int, weight: float, *, seed: int, attack: Customizer
) -> Lesson:
    """Class images under the class's prompt: what keeps the class from becoming the subject."""
    prompt = PHOTO.format(class_word)
    latents = priors.latents(prompt, count, seed=seed, sampling=attack.sampling)
    tokens = _tokens(priors.base, [prompt]).expand(count, -1)
    return Lesson(latents=latents, spread=None, tokens=tokens, valid=torch.ones_like(latents[:, :1]), weight=weight)


def fit(pipeline: Any, lessons: Sequence[Lesson], attack: Customizer, *, seed: int) -> None:
    """Trains whatever weights of UNet and text encoder require gradients; freezes everything afterwards.

    Every update minimises the sum over lessons of weight * mean (prediction - target)^2, the target being the noise
    or v as the model's schedule says: one batch with `attack.batch` rows of each lesson.
    """
    unet, text_encoder, device = pipeline.unet, pipeline.text_encoder, pipeline.device
    weights = []
    for network in (unet, text_encoder):
        trained = [weight for weight in network.parameters() if weight.requires_grad]
        network.train(bool(trained))
        weights += trained
    optimizer = torch.optim.AdamW(weights, lr=attack.rate, weight_decay=1e-2)
    schedule = NoiseSchedule.from_config(pipeline.scheduler.config).to(device)
    shares = torch.tensor([lesson.weight for lesson in lessons], device=device)
    (generator,) = streams([seed], f"{attack.name}/train")
    for _ in range(attack.steps):
        rows = zip(*(lesson.draw(attack.batch, generator) for lesson in lessons), strict=True)
        latents, tokens, valid = (torch.cat(part) for part in rows)
        noise = torch.randn(latents.shape, generator=generator).to(device)
        times = torch.randint(0, schedule.timesteps, (len(latents),), generator=generator).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=attack.bf16):
            text = text_encoder(tokens)[0]
            prediction = unet(schedule.add_noise(latents, noise, times), times, text).sample
        errors = (prediction.float() - schedule.target(latents, noise, times)).square().mean(dim=1, keepdim=True)
        losses = (errors * valid).sum(dim=(1, 2, 3)) / valid.sum(dim=(1, 2, 3))
        optimizer.zero_grad(set_to_none=True)
        (losses.view(len(lessons), attack.batch).mean(dim=1) * shares).sum().backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    unet.requires_grad_(False).eval()
    text_encoder.requires_grad_(False).eval()


def _tokens(pipeline: Any, prompts: Sequence[str]) -> Tensor:
    tokenizer = pipeline.tokenizer
    ids: Tensor = tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt").input_ids
    return ids.to(pipeline.device)
