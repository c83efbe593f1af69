"""The noise schedule of a diffusion model and the closed forms that follow from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor

from protectors.model_files import ModelError

PredictionType = Literal["epsilon", "v_prediction"]


class NoiseSchedule:
    """abar_t and the arithmetic between clean latents z, noise n, noisy latents z_t and predictions.

    Args:
        alphas_cumprod: abar_t for t = 0..T-1, ``(T,)`` float32.
        prediction_type: what the network predicts: the noise, or v = sqrt(abar) n - sqrt(1 - abar) z.

    Shape: latents, noise and predictions ``(B, C, h, w)`` float32; t ``(B,)`` int64.
    """

    def __init__(self, alphas_cumprod: Tensor, prediction_type: PredictionType) -> None:
        self.alphas_cumprod = alphas_cumprod
        self.prediction_type = prediction_type

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Reads a diffusers scheduler configuration; raises ModelError for what is not supported."""
        prediction = config.get("prediction_type", "epsilon")
        if prediction not in ("epsilon", "v_prediction"):
            raise ModelError(f"prediction type {prediction!r} is not supported; use an epsilon or v_prediction model")
        if config.get("rescale_betas_zero_snr"):
            # abar_T = 0 makes the epsilon-form and x0 estimates divide by zero at the last timestep.
            raise ModelError("rescale_betas_zero_snr is not supported; use a model trained without it")
        alphas = (1 - _betas(config)).cumprod(0)
        return cls(alphas.float(), cast(PredictionType, prediction))

    @property
    def timesteps(self) -> int:
        """T, the number of timesteps of the training schedule."""
        return len(self.alphas_cumprod)

    def to(self, device: torch.device | str) -> NoiseSchedule:
        return NoiseSchedule(self.alphas_cumprod.to(device), self.prediction_type)

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """z_t = sqrt(abar_t) z + sqrt(1 - abar_t) n."""
        signal, spread = self._factors(t)
        return signal * latents + spread * noise

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What a perfect network would predict: n, or v for v-prediction models."""
        if self.prediction_type == "epsilon":
            return noise
        signal, spread = self._factors(t)
        return signal * noise - spread * latents

    def predict_x0(self, noisy: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """The clean latents that the prediction implies."""
        if self.prediction_type == "epsilon":
            return self.remove_noise(noisy, prediction, t)
        signal, spread = self._factors(t)
        return signal * noisy - spread * prediction

    def remove_noise(self, noisy: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """z = (z_t - sqrt(1 - abar_t) n) / sqrt(abar_t), the inverse of ``add_noise``."""
        signal, spread = self._factors(t)
        return (noisy - spread * noise) / signal

    def predict_noise(self, noisy: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """The noise that the prediction implies: itself, or sqrt(abar) v + sqrt(1 - abar) z_t."""
        if self.prediction_type == "epsilon":
            return prediction
        signal, spread = self._factors(t)
        return signal * prediction + spread * noisy

    def _factors(self, t: Tensor) -> tuple[Tensor, Tensor]:
        abar = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        return abar.sqrt(), (1 - abar).sqrt()


def _betas(config: Mapping[str, Any]) -> Tensor:
    trained = config.get("trained_betas")
    if trained is not None:
        return torch.tensor(trained, dtype=torch.float64)
    steps = int(config.get("num_train_timesteps", 1000))
    # The defaults are those of diffusers' training schedulers: old folders leave these fields out.
    first, last = float(config.get("beta_start", 0.0001)), float(config.get("beta_end", 0.02))
    kind = config.get("beta_schedule", "linear")
    if kind == "linear":
        return torch.linspace(first, last, steps, dtype=torch.float64)
    if kind == "scaled_linear":
        return torch.linspace(first**0.5, last**0.5, steps, dtype=torch.float64).square()
    if kind == "squaredcos_cap_v2":
        time = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        abar = torch.cos((time + 0.008) / 1.008 * math.pi / 2).square()
        return (1 - abar[1:] / abar[:-1]).clamp(max=0.999)
    raise ModelError(
        f"beta schedule {kind!r} is not supported; known: linear, scaled_linear, squaredcos_cap_v2, trained_betas"
    )
