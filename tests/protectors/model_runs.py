"""Small runs of model protectors that can be looked into, and their losses once more, in float64 from the equations."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from protectors.apdm import APDM, APDMConfig
from protectors.concepts import Concept
from protectors.diffusion import DiffusionModel, load_model
from protectors.learning_to_protect import ProtectionLoss, Sample
from protectors.model_base import Study
from protectors.objectives import Draws
from tests.protectors.tiny import save_tiny_model

SIZE = 16
RATE = 1e-3
SMALL = APDMConfig(steps=2, rate=RATE, inner_steps=3, attacker_rates=(RATE,), class_images=3)


def small_model(folder: Path, *, prediction_type: str = "epsilon", seed: int = 0) -> DiffusionModel:
    """The tiny model at a base size of 16 pixels: its attention at 64 is what costs."""
    file = save_tiny_model(folder, prediction_type=prediction_type, seed=seed) / "unet" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "sample_size": SIZE // 2}))
    return load_model(str(folder))


def concept(count: int = 3, *, seed: int = 0, class_word: str = "dog") -> Concept:
    images = torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    return Concept(images=images, class_word=class_word)


class Watched(APDM):
    """Remembers where and on what each gradient was taken, and what came of it."""

    def __init__(self, config: APDMConfig, model: DiffusionModel) -> None:
        super().__init__(config, model)
        self.starts: list[list[Tensor]] = []
        self.visits: list[tuple[Sample, list[Tensor]]] = []
        self.gradients: list[list[Tensor]] = []
        self.references: list[list[Tensor]] = []

    def _accumulate(self, study: Study, step: int, gradient: tuple[Tensor, ...]) -> dict[str, float]:
        self.starts.append(copied(study.copy.parameters))
        values = super()._accumulate(study, step, gradient)
        self.gradients.append(copied(gradient))
        self.references.append(copied(study.reference.unet.parameters()))
        return values

    def _loss(self, study: Study, sample: Sample) -> ProtectionLoss:
        self.visits.append((sample, copied(study.copy.parameters)))
        return super()._loss(study, sample)


def copied(tensors: Any) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def unet64(model: DiffusionModel, weights: Sequence[Tensor] | None = None) -> Any:
    """A copy of the UNet in float64, with these weights if they are given; they take gradients."""
    unet = copy.deepcopy(model.unet).double().requires_grad_(True)
    if weights is not None:
        with torch.no_grad():
            for parameter, weight in zip(unet.parameters(), weights, strict=True):
                parameter.copy_(weight)
    return unet


def squared_error64(model: DiffusionModel, unet: Any, latents: Tensor, embeddings: Tensor, draws: Draws) -> Tensor:
    """Section 2 of the paper, written down again."""
    abar = model.alphas_cumprod.double()[draws.t].view(-1, 1, 1, 1)
    z, noise = latents.double(), draws.noise.double()
    prediction = unet(abar.sqrt() * z + (1 - abar).sqrt() * noise, draws.t, embeddings.double()).sample
    target = abar.sqrt() * noise - (1 - abar).sqrt() * z if model.prediction_type == "v_prediction" else noise
    squares: Tensor = (prediction - target) ** 2
    return squares


def protection64(model: DiffusionModel, unet: Any, sample: Sample, config: APDMConfig) -> Tensor:
    """L_dpo + w_p L_ppl with the sigmoid of each element."""
    errors = squared_error64(model, unet, sample.latents, sample.embeddings, sample.draws)
    with torch.no_grad():
        before = squared_error64(model, unet64(model), sample.latents, sample.embeddings, sample.draws)
    size = len(errors) // 3
    gained = errors - before
    margin = gained[:size] - gained[size : 2 * size]
    dpo = (1 + (config.beta * margin).exp()).log().mean()
    return dpo + config.preservation_weight * errors[2 * size :].mean()


def distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Relative L2 distance over all tensors together."""
    difference = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(found, expected, strict=True))
    return float((difference / sum(float(b.double().square().sum()) for b in expected)) ** 0.5)


def adamw_once(weights: Sequence[Tensor], gradient: Sequence[Tensor], rate: float) -> list[Tensor]:
    """The first step of AdamW, by hand: its bias-corrected moments are the gradient and its square."""
    return [
        weight.double() * (1 - rate * 0.01) - rate * part / (part.abs() + 1e-8)
        for weight, part in zip(weights, gradient, strict=True)
    ]
