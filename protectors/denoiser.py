"""What wrappers of latent and of pixel-space diffusion models have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from protectors.schedule import NoiseSchedule, PredictionType


class Denoiser:
    """A diffusion model's network and its noise schedule.

    Args:
        unet: diffusers' network.
        schedule: noise schedule and prediction type.
        digest: names the content of the model's files, see ``model_digest``.

    Shape: clean and noisy samples and noise ``(N, C, h, w)`` float32; t ``(N,)`` int64.
    """

    def __init__(self, unet: Any, schedule: NoiseSchedule, *, digest: str) -> None:
        self.unet, self.schedule, self.digest = unet, schedule, digest

    @property
    def device(self) -> torch.device:
        device: torch.device = self.unet.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.unet.dtype
        return dtype

    @property
    def prediction_type(self) -> PredictionType:
        return self.schedule.prediction_type

    @property
    def alphas_cumprod(self) -> Tensor:
        return self.schedule.alphas_cumprod

    def add_noise(self, samples: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Samples at noise level t."""
        return self.schedule.add_noise(samples, noise, t)
