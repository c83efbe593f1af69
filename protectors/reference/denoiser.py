"""Trains the denoiser and the text encoder on latents of a finished autoencoder."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from protectors.diffusion import choose_attention
from protectors.reference.checkpoint import Cursor
from protectors.reference.data import CropRule, Photos, order, random_crop
from protectors.reference.geometry import TRAIN_STEPS, Geometry
from protectors.reference.learner import Learner, rate_factor, step_generator
from protectors.reference.noise import NoisePredictor, Probe, encode
from protectors.reference.tokenizer import ADDED, IDENTIFIERS, build_tokenizer
from protectors.reference.vae import load_vae

_WORDS = 3  # first word of the seed sequence for changes to captions; data.py uses 1 and 2


def build_unet(geometry: Geometry) -> Any:
    """Returns an untrained denoiser: Stable Diffusion's blocks, one layer each, the coarsest without attention."""
    levels = len(geometry.unet_channels) - 1
    return UNet2DConditionModel(
        sample_size=geometry.image_size // 8,
        in_channels=geometry.latent_channels,
        out_channels=geometry.latent_channels,
        block_out_channels=geometry.unet_channels,
        layers_per_block=1,
        norm_num_groups=geometry.unet_norm_groups,
        cross_attention_dim=geometry.text_width,
        attention_head_dim=geometry.heads,  # diffusers reads this as the number of heads, as in SD 1.x
        down_block_types=("CrossAttnDownBlock2D",) * levels + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * levels,
    )


def build_text_encoder(geometry: Geometry, tokenizer: Any) -> Any:
    """Returns an untrained CLIP text encoder whose special tokens are the tokenizer's."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=geometry.text_width,
        intermediate_size=4 * geometry.text_width,
        projection_dim=geometry.text_width,
        num_hidden_layers=geometry.text_layers,
        num_attention_heads=geometry.heads,
        max_position_embeddings=geometry.text_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def _copy_weights(network: Any, file: Path) -> None:
    try:
        network.load_state_dict(load_file(file))
    except RuntimeError as error:  # names or shapes differ
        raise ValueError(f"{file} holds a model of another geometry: begin from one of the same size") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class SdPlan:
    """How denoiser and text encoder are trained."""

    # Updates in all; the learning rate reaches zero there.
    steps: int = 16000
    rate: float = 6e-4
    batch: int = 24
    # Crops per photo whose latents are computed once; encoding anew each time would double the cost.
    crops: int = 6
    # Min-SNR weighting (https://arxiv.org/abs/2303.09556, gamma 5): fine detail, which is easy to predict at
    # little noise and most of the uniform loss, does not crowd out shapes.
    snr_gamma: float = 5.0
    # Share of empty prompts, for classifier-free guidance.
    unconditional: float = 0.1
    # Share of captions with a meaningless identifier put in, so that "sks dog" is no stranger to the model.
    identifiers: float = 0.05
    bf16: bool = True


class SdTask:
    """One training of denoiser and text encoder; `train.run` calls it step by step."""

    name = "sd"

    def __init__(
        self,
        geometry: Geometry,
        plan: SdPlan,
        photos: tuple[Photos, Photos],
        *,
        device: str,
        vae_folder: Path,
        cache: Path,
        note: Callable[[str], None],
        begin: Path | None = None,
    ) -> None:
        self.plan, self.device, self.steps = plan, device, plan.steps
        train, held_out = photos
        if begin is None:
            words = build_tokenizer(train.captions, vocabulary=geometry.vocabulary, length=geometry.text_length)
        else:
            words = CLIPTokenizer.from_pretrained(str(begin / "tokenizer"), local_files_only=True)
        self.tokenizer = words
        self.vae: Any = load_vae(vae_folder).to(device).eval()
        self.unet = build_unet(geometry).to(device)
        choose_attention(self.unet)
        self.text_encoder = build_text_encoder(geometry, self.tokenizer).to(device)
        if begin is not None:
            _copy_weights(self.unet, begin / "unet" / "diffusion_pytorch_model.safetensors")
            _copy_weights(self.text_encoder, begin / "text_encoder" / "model.safetensors")
        self.learner = Learner({"unet": self.unet, "text_encoder": self.text_encoder}, rate=plan.rate)
        self._noise = NoisePredictor(self.unet, self.text_encoder, self.tokenizer, device=device, bf16=plan.bf16)
        self._captions, self._count = train.captions, len(train)
        self._probe = Probe.of(held_out, self.vae, geometry.image_size, device, bf16=plan.bf16)
        self._train_probe = Probe.of(train.spread(len(held_out)), self.vae, geometry.image_size, device, bf16=plan.bf16)
        self._note = note
        self._latents = self._cached_latents(train, geometry.image_size, cache)

    def train_step(self, cursor: Cursor) -> tuple[float, int]:
        """Makes one update; returns its loss and the number of latents used."""
        picks = order(len(self._latents), seed=cursor.seed, position=cursor.position, batch=self.plan.batch)
        words = np.random.default_rng([_WORDS, cursor.seed, cursor.step])
        prompts = [self._vary(self._captions[pick % self._count], words) for pick in picks]
        generator = step_generator(cursor)
        latents = self._latents[picks].float().to(self.device)
        noise = torch.randn(latents.shape, generator=generator).to(self.device)
        times = torch.randint(0, TRAIN_STEPS, (len(picks),), generator=generator).to(self.device)
        errors = (self._noise.predict(latents, noise, times, prompts) - noise).square().mean(dim=(1, 2, 3))
        loss = (self._noise.min_snr_weights(times, self.plan.snr_gamma) * errors).mean()
        self.learner.update(loss, step=cursor.step, factor=rate_factor(cursor.step, self.steps))
        return loss.item(), len(picks)

    def _vary(self, caption: str, words: np.random.Generator) -> str:
        drop, insert = words.random(2)
        if drop < self.plan.unconditional:
            return ""
        if insert < self.plan.identifiers:
            identifier = (*IDENTIFIERS, *ADDED)[int(words.integers(len(IDENTIFIERS) + len(ADDED)))]
            return caption.replace("a photo of a ", f"a photo of a {identifier} ", 1)
        return caption

    def held_out(self) -> dict[str, float]:
        """Mean squared error of the noise predicted with averaged weights, on held-out and on training photos."""
        with self.learner.averaged():
            return {
                "held_out_loss": self._probe.loss(self._noise),
                "train_loss": self._train_probe.loss(self._noise),
            }

    def _cached_latents(self, photos: Photos, size: int, file: Path) -> Tensor:
        """Returns scaled latents `(crops * photos, C, h, w)`, computed once per cache file."""
        shape = (self.plan.crops * len(photos), self.vae.config.latent_channels, size // 8, size // 8)
        if file.exists():
            stored: Tensor = load_file(file)["latents"]
            if stored.shape == shape:
                return stored
        # Smaller crops than these would show only a part of what the caption names.
        rule = CropRule(size, scales=(0.8, 1.0), squeeze=1.4)
        rounds = []
        for number in range(self.plan.crops):
            crops = [random_crop(image, rule, (number, place)) for place, image in enumerate(photos.images)]
            rounds.append(encode(self.vae, crops, self.device, bf16=self.plan.bf16))
            self._note(f"sd: latents of crop {number + 1} of {self.plan.crops}")
        latents = torch.cat(rounds).contiguous()  # the encoder may answer channels-last, which safetensors refuses
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"latents": latents}, file)
        return latents
