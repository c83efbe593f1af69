"""Noise prediction by denoiser and text encoder together, and a fixed probe to compare such models by."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor

from protectors.reference.data import Photos, centre_crop
from protectors.reference.geometry import SCHEDULE, TRAIN_STEPS


class NoisePredictor:
    """Predicts the noise that was mixed into latents, given a prompt each."""

    def __init__(self, unet: Any, text_encoder: Any, tokenizer: Any, *, device: str, bf16: bool) -> None:
        self.unet, self.text_encoder, self.tokenizer = unet, text_encoder, tokenizer
        self.device, self.bf16 = device, bf16
        self._alphas = DDPMScheduler(**SCHEDULE).alphas_cumprod.to(device)

    def predict(self, latents: Tensor, noise: Tensor, times: Tensor, prompts: list[str]) -> Tensor:
        """Mixes `noise` into scaled `latents` and predicts it. Shape: `(N, C, h, w)`, times `(N,)`."""
        alphas = self._alphas[times].view(-1, 1, 1, 1)
        noisy = alphas.sqrt() * latents + (1 - alphas).sqrt() * noise
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            text = self.text_encoder(tokens.to(self.device))[0]
            prediction: Tensor = self.unet(noisy, times, text).sample
        return prediction.float()

    def min_snr_weights(self, times: Tensor, gamma: float) -> Tensor:
        """Weights of the noise error at each time: min(SNR, gamma) / SNR (arXiv 2303.09556, equation 5)."""
        alphas = self._alphas[times]
        ratio = alphas / (1 - alphas)
        weights: Tensor = ratio.clamp_max(gamma) / ratio
        return weights


@dataclass(frozen=True, slots=True)
class Probe:
    """Latents, noise, times and prompts that stay the same from one measurement to the next."""

    latents: Tensor
    noise: Tensor
    times: Tensor
    prompts: list[str]

    @classmethod
    def of(cls, photos: Photos, vae: Any, size: int, device: str, *, bf16: bool) -> "Probe":
        """Takes the centre of each photo at four times that are spread evenly over the schedule."""
        times_per_photo = 4
        latents = encode(vae, [centre_crop(image, size) for image in photos.images], device, bf16=bf16)
        latents = latents.float().repeat(times_per_photo, 1, 1, 1).to(device)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)).to(device)
        times = torch.linspace(0, TRAIN_STEPS - 1, len(latents)).long()
        # Neighbours in the list are of one class; shuffled, every class meets early and late times.
        times = times[torch.randperm(len(times), generator=torch.Generator().manual_seed(1))]
        return cls(latents, noise, times.to(device), photos.captions * times_per_photo)

    @torch.no_grad()
    def loss(self, predictor: NoisePredictor) -> float:
        """Returns the mean squared error of the predicted noise; 1.0 is what predicting nothing scores."""
        errors = []
        for start in range(0, len(self.latents), 64):
            part = slice(start, start + 64)
            noise = self.noise[part]
            predicted = predictor.predict(self.latents[part], noise, self.times[part], self.prompts[part])
            errors.append(F.mse_loss(predicted, noise, reduction="none").mean(dim=(1, 2, 3)))
        return torch.cat(errors).mean().item()


@torch.no_grad()
def encode(vae: Any, crops: list[Tensor], device: str, *, bf16: bool) -> Tensor:
    """Returns the scaled mean latents of square crops in [0, 1] as float16 on the processor."""
    parts = []
    for start in range(0, len(crops), 32):
        pixels = torch.stack(crops[start : start + 32]).to(device) * 2 - 1
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            mean = vae.encode(pixels).latent_dist.mode()
        parts.append((mean.float() * vae.config.scaling_factor).half().cpu())
    return torch.cat(parts)
