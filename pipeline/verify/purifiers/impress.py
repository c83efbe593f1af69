"""IMPRESS: searches for the nearest image that the autoencoder reproduces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pipeline.verify.attack_models import AttackModels, ModelKind
from pipeline.verify.editors.base import model_stride
from pipeline.verify.padding import pad_to_multiple
from pipeline.verify.purifiers.base import Purifier
from protectors.randomness import normal

# Five scales of a window of 11: torchmetrics refuses MS-SSIM below this, and SSIM takes its place.
_SMALLEST_FOR_MULTISCALE = 176


@dataclass(frozen=True, kw_only=True)
class ImpressLite(Purifier):
    """Makes an image consistent with its VAE reconstruction, on a structural leash (IMPRESS-lite).

    IMPRESS, https://arxiv.org/abs/2310.19248: Adam minimises
    mean (D(mu(E(x))) - x)^2 + leash_weight * max(distance(x, given) - leash, 0), x in [-1, 1].

    Works at: the image's own size, mirrored to the model's stride; float32.
    Differs from the paper: distance is 1 - MS-SSIM (1 - SSIM where a side is below 176 pixels) and not LPIPS, whose
    weights do not come with this package; hence "lite", and the paper's leash of 0.1 means something else here.
    """

    needs: ClassVar[ModelKind | None] = ModelKind.LATENT

    iterations: int = 3000
    # Adam's, falling by a cosine to 1e-5.
    rate: float = 0.01
    leash: float = 0.1
    leash_weight: float = 0.1
    # Standard deviation of the start around the given image, in [-1, 1] units.
    noise: float = 0.0

    @property
    def randomised(self) -> bool:
        return self.noise > 0

    def _purify(self, images: Tensor, generators: Sequence[torch.Generator], models: AttackModels) -> Tensor:
        pipeline = models.get(ModelKind.LATENT)
        given = pad_to_multiple(images, model_stride(pipeline)).to(pipeline.device) * 2 - 1
        start = given + self.noise * normal(generators, given.shape[1:]).to(given)
        current = start.clamp(-1, 1).requires_grad_()
        optimizer = torch.optim.Adam([current], lr=self.rate, eps=1e-5)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.iterations, eta_min=1e-5)
        for _ in range(self.iterations):
            with torch.enable_grad():
                decoded = pipeline.vae.decode(pipeline.vae.encode(current).latent_dist.mode()).sample
                inconsistent = (decoded - current).square().flatten(1).mean(1)
                strayed = (structural_distance(current / 2 + 0.5, given / 2 + 0.5) - self.leash).clamp(min=0)
                # A sum over images, so that each has the gradient it has alone.
                loss = (inconsistent + self.leash_weight * strayed).sum()
                (current.grad,) = torch.autograd.grad(loss, [current])
            optimizer.step()
            schedule.step()
            current.clamp_(-1, 1)
        return current.detach()[..., : images.shape[-2], : images.shape[-1]] / 2 + 0.5


def structural_distance(left: Tensor, right: Tensor) -> Tensor:
    """1 - MS-SSIM of images `(B, 3, H, W)` in [0, 1], `(B,)`; 1 - SSIM where a side is below 176 pixels."""
    from torchmetrics.functional.image import (
        multiscale_structural_similarity_index_measure,
        structural_similarity_index_measure,
    )

    if min(left.shape[-2:]) < _SMALLEST_FOR_MULTISCALE:
        similarity = structural_similarity_index_measure(left, right, data_range=1.0, reduction="none")
    else:
        similarity = multiscale_structural_similarity_index_measure(
            left, right, data_range=1.0, reduction="none", normalize="relu"
        )
    distance: Tensor = 1 - similarity
    return distance
