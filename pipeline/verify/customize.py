"""Customization attacks: what somebody does who has a handful of another's photos and a diffusion model."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from protectors.diffusion import choose_attention
from protectors.model_files import check_folder
from protectors.randomness import streams
from protectors.schedule import NoiseSchedule


@dataclass(frozen=True, slots=True, kw_only=True)
class DreamBoothConfig:
    """DreamBooth (Ruiz et al., CVPR 2023, https://arxiv.org/abs/2208.12242) with prior preservation."""

    steps: int
    rate: float
    # Photos of the subject per update; as many of the class are added for the prior.
    batch: int
    # Weight of the loss on the class images (lambda in the paper).
    prior_weight: float = 1.0
    # Class images that the model itself makes before training.
    prior_images: int = 200
    train_text_encoder: bool = True
    identifier: str = "sks"
    # Denoising steps and guidance when sampling, for the class images too.
    sample_steps: int = 50
    guidance: float = 7.5
    # Train under autocast to bfloat16; weights and optimizer stay float32. Sampling is always float32: guidance
    # would multiply the rounding, which is as large as the guidance itself on nano-sd.
    bf16: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "prior_images", "sample_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    def subject_prompt(self, class_word: str) -> str:
        """The prompt that the subject is bound to."""
        return f"a photo of a {self.identifier} {class_word}"

    def class_prompt(self, class_word: str) -> str:
        """The prompt of the class in general."""
        return f"a photo of a {class_word}"


PRESETS: dict[str, DreamBoothConfig] = {
    # The protocol of Anti-DreamBooth, for SD 2.1-base.
    "literature": DreamBoothConfig(steps=1000, rate=5e-7, batch=2, sample_steps=100),
    # For nano-sd, with clean images in mind; `fixative models evaluate` measures how far it gets and what it costs.
    "quick": DreamBoothConfig(steps=200, rate=2e-4, batch=4, prior_images=32, sample_steps=25, guidance=5.0),
}


def load_pipeline(folder: Path, device: str = "cpu") -> Any:
    """Loads a StableDiffusionPipeline in float32 from a local folder, safetensors only, without safety checker.

    Raises:
        ModelError: not a complete latent text-to-image model.
    """
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    check_folder(folder)
    pipeline = StableDiffusionPipeline.from_pretrained(
        str(folder), torch_dtype=torch.float32, use_safetensors=True, local_files_only=True, safety_checker=None
    ).to(device)
    # DDIM clips by default, where the folder's own scheduler does not say; latents must not be clipped.
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    choose_attention(pipeline.unet)
    return pipeline


class DreamBooth:
    """Binds a subject to an identifier by training UNet and text encoder on a few photos.

    Two passes per update are one batch: photos under the subject's prompt, and class images under the class
    prompt. Latents of the photos are computed once (the VAE is frozen) and their posterior is sampled anew in
    every update. Class images are kept as latents, so they are never decoded and encoded again.

    Args:
        pipeline: the base model, see `load_pipeline`; it is never changed.
    """

    def __init__(self, pipeline: Any, config: DreamBoothConfig) -> None:
        self.pipeline, self.config = pipeline, config
        self._priors: dict[tuple[str, int], Tensor] = {}

    def customize(self, images: Tensor, class_word: str, *, seed: int) -> Any:
        """Returns a pipeline of its own weights that knows the subject.

        Args:
            images: `(N, 3, S, S)` in [0, 1] at the model's base size S.
            class_word: what the subject is, e.g. "dog".
            seed: of order, noise, timesteps and class images.

        Raises:
            ValueError: the images have another size.
        """
        size = self.pipeline.unet.config.sample_size * self.pipeline.vae_scale_factor
        if images.shape[1:] != (3, size, size):
            raise ValueError(f"images must be 3 x {size} x {size}, the model's size, not {tuple(images.shape[1:])}")
        config, device = self.config, self.pipeline.device
        prior = self._prior(class_word, seed)
        unet, text_encoder = copy.deepcopy(self.pipeline.unet), copy.deepcopy(self.pipeline.text_encoder)
        unet.requires_grad_(True).train()
        text_encoder.requires_grad_(config.train_text_encoder).train(config.train_text_encoder)
        weights = [weight for net in (unet, text_encoder) for weight in net.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=config.rate, weight_decay=1e-2)
        with torch.no_grad():
            posterior = self.pipeline.vae.encode((images * 2 - 1).to(device)).latent_dist
        schedule = NoiseSchedule.from_config(self.pipeline.scheduler.config).to(device)
        prompts = [config.subject_prompt(class_word)] * config.batch + [config.class_prompt(class_word)] * config.batch
        tokens = self._tokens(prompts)
        (generator,) = streams([seed], "dreambooth/train")
        for _ in range(config.steps):
            latents = torch.cat([self._subject(posterior, generator), _pick(prior, config.batch, generator)])
            noise = torch.randn(latents.shape, generator=generator).to(device)
            times = torch.randint(0, schedule.timesteps, (len(latents),), generator=generator).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
                text = text_encoder(tokens)[0]
                prediction = unet(schedule.add_noise(latents, noise, times), times, text).sample
            target = schedule.target(latents, noise, times)
            subject, general = (prediction.float() - target).square().mean(dim=(1, 2, 3)).chunk(2)
            optimizer.zero_grad(set_to_none=True)
            (subject.mean() + config.prior_weight * general.mean()).backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
        return self._with(unet.eval().requires_grad_(False), text_encoder.eval().requires_grad_(False))

    def sample(self, pipeline: Any, prompt: str, count: int, *, seed: int) -> Tensor:
        """Images `(count, 3, H, W)` in [0, 1]; image i depends on `seed` and i, not on `count`."""
        latents = self._latents(pipeline, prompt, count, seed=seed, purpose="dreambooth/sample")
        with torch.no_grad():
            parts = [
                pipeline.vae.decode(part / pipeline.vae.config.scaling_factor).sample
                for part in torch.split(latents, 8)
            ]
        images: Tensor = (torch.cat(parts).float() / 2 + 0.5).clamp(0, 1).cpu()
        return images

    def _latents(self, pipeline: Any, prompt: str, count: int, *, seed: int, purpose: str) -> Tensor:
        parts = []
        for start in range(0, count, 16):
            numbers = range(start, min(count, start + 16))
            output = pipeline(
                prompt,
                num_images_per_prompt=len(numbers),
                num_inference_steps=self.config.sample_steps,
                guidance_scale=self.config.guidance,
                generator=[generator for number in numbers for generator in streams([seed], f"{purpose}/{number}")],
                output_type="latent",
            )
            parts.append(output.images)
        return torch.cat(parts)

    def _prior(self, class_word: str, seed: int) -> Tensor:
        """Scaled latents of class images; kept, because all cells of one subject share them."""
        key = (class_word, seed)
        if key not in self._priors:
            self._priors.clear()  # one class at a time is in use
            prompt = self.config.class_prompt(class_word)
            self._priors[key] = self._latents(
                self.pipeline, prompt, self.config.prior_images, seed=seed, purpose="dreambooth/prior"
            )
        return self._priors[key]

    def _subject(self, posterior: Any, generator: torch.Generator) -> Tensor:
        mean, std = (_scaled(self.pipeline.vae, moment) for moment in (posterior.mean, posterior.std))
        places = torch.randint(0, len(mean), (self.config.batch,), generator=generator)
        noise = torch.randn(mean[places].shape, generator=generator).to(mean.device)
        drawn: Tensor = mean[places] + std[places] * noise
        return drawn

    def _tokens(self, prompts: list[str]) -> Tensor:
        tokenizer = self.pipeline.tokenizer
        ids: Tensor = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return ids.to(self.pipeline.device)

    def _with(self, unet: Any, text_encoder: Any) -> Any:
        customized = copy.copy(self.pipeline)
        customized.register_modules(unet=unet, text_encoder=text_encoder)
        return customized


def _scaled(vae: Any, latents: Tensor) -> Tensor:
    return latents * float(vae.config.scaling_factor)


def _pick(latents: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return latents[torch.randint(0, len(latents), (count,), generator=generator)]
