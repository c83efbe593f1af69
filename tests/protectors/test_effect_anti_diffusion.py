"""Whether Anti-Diffusion does on the embedded model what its paper says: measured, with intervals over photos.

E1 more denoising loss than under random noise of the same size; E2 a tuned prompt denoises better than the empty one;
E3 the semantic disturbance loss lowers the mean of clamped, squared attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from protectors.anti_diffusion import AntiDiffusion, mean_attention, semantic_disturbance
from protectors.attention import cross_attention_layers, recorded
from protectors.diffusion import DiffusionModel, load_model
from protectors.objectives import draw, latent_denoising_loss
from protectors.prompt_tuning import tune_prompts
from protectors.randomness import streams
from protectors.reference import reference_path
from tests.protectors.effects import is_above_zero, mean_difference, photos

FAST = AntiDiffusion.presets["fast"]
DRAWS = 64
TUNING_STEPS = 40


@dataclass(frozen=True)
class Measured:
    """Means over fixed draws, one per photo."""

    loss: Tensor
    """L_dn under the pretrained UNet."""
    attention: Tensor
    """mean(M^2), which is minus L_sdl."""


def random_signs(images: Tensor, levels: float) -> Tensor:
    signs = torch.randint(0, 2, images.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return (images + signs * levels / 255).clamp(0, 1)


@torch.no_grad()
def measure(model: DiffusionModel, images: Tensor, prompts: Tensor) -> Measured:
    generators = streams(range(len(images)), "effect")
    layers = max(cross_attention_layers(model.unet).items())[1]
    moments = model.encode_moments(images)
    losses, attention = [], []
    for _ in range(DRAWS):
        draws = draw(model, images, generators)
        latents = model.latents(moments, draws.posterior)
        with recorded(layers) as maps:
            losses.append(latent_denoising_loss(model, latents, prompts, draws))
        attention.append(-semantic_disturbance(mean_attention(maps, FAST.heads), FAST.sdl_scale))
    return Measured(torch.stack(losses).mean(0), torch.stack(attention).mean(0))


def tuned_prompts(model: DiffusionModel, images: Tensor) -> Tensor:
    generators = streams(range(len(images)), "tuning")
    with torch.no_grad():
        moments = model.encode_moments(images)

    def loss(prompts: Tensor, step: int) -> Tensor:
        draws = draw(model, images, generators)
        return latent_denoising_loss(model, model.latents(moments, draws.posterior), prompts, draws)

    start = model.embed_prompts([""] * len(images))
    return tune_prompts(loss, start, steps=TUNING_STEPS, rate=FAST.pt_rate)


@pytest.fixture(scope="module")
def model() -> DiffusionModel:
    return load_model(str(reference_path()))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_effect_on_the_embedded_model(model: DiffusionModel) -> None:
    images = photos()
    seeds = list(range(len(images)))
    protected = AntiDiffusion(FAST, model).protect(images, seeds=seeds).images
    blind = AntiDiffusion(FAST.replace(lambda_sdl=0), model).protect(images, seeds=seeds).images
    noisy = random_signs(images, FAST.eps_levels)
    empty, tuned = model.embed_prompts([""] * len(images)), tuned_prompts(model, images)
    under_attack = measure(model, protected, empty)
    gains = {
        "E1, empty prompt": mean_difference(under_attack.loss, measure(model, noisy, empty).loss),
        "E1, tuned prompt": mean_difference(measure(model, protected, tuned).loss, measure(model, noisy, tuned).loss),
        "E2": mean_difference(measure(model, images, empty).loss, measure(model, images, tuned).loss),
        "E3": mean_difference(measure(model, blind, empty).attention, under_attack.attention),
    }
    print(gains)
    assert [name for name, gain in gains.items() if not is_above_zero(gain)] == []
