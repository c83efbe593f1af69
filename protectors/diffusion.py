"""Wrapper for latent diffusion models (VAE, UNet, text encoder), from any diffusers folder or hub id."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from protectors.denoiser import Denoiser
from protectors.model_files import Form, ModelError, check_folder, load_network, model_digest, read_json, resolve_folder
from protectors.randomness import normal
from protectors.schedule import NoiseSchedule

__all__ = ["DiffusionModel", "LatentModel", "LatentParts", "ModelError", "load_latent", "load_model", "model_digest"]

# An archive can bring one caption per image: the cache must not grow with it.
_PROMPT_CACHE = 256
# Largest side of latents for which plain attention is taken on the CPU.
_PLAIN_ATTENTION_SIDE = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentParts:
    """The networks of a latent diffusion model as diffusers and transformers load them."""

    vae: Any
    unet: Any
    text_encoder: Any
    tokenizer: Any


class LatentModel(Denoiser, ABC):
    """What all latent diffusion models share: frozen networks that take images in [0, 1] of any size.

    Images, latents, losses and schedule arithmetic are float32; only the networks run in ``dtype``.
    Sides that are no multiple of ``stride`` are padded on the right and at the bottom by repeating the
    last pixel, so latents can cover a little more than the image. Gradients flow wherever the caller
    has a graph; weights never receive any.

    Args:
        parts: the networks; they are frozen and set to evaluation in place.
        schedule: noise schedule and prediction type.
        digest: names the content of the model's files, see ``model_digest``.

    Shape: images ``(B, 3, H, W)`` float32 in [0, 1]; latents ``(B, C, h, w)`` float32 with h and w the
    padded sides divided by the VAE's factor; t ``(B,)`` int64; embeddings ``(B, L, D)`` float32.

    Raises:
        ModelError: the networks do not fit together, or not the form of the subclass.
    """

    form: ClassVar[Form]
    """What a folder of such a model holds."""

    def __init__(self, parts: LatentParts, schedule: NoiseSchedule, *, digest: str) -> None:
        self._check_channels(parts.unet.config.in_channels, parts.vae.config.latent_channels)
        _check_parts(parts)
        super().__init__(parts.unet, schedule, digest=digest)
        self.vae = parts.vae
        self.text_encoder = parts.text_encoder
        self.tokenizer = parts.tokenizer
        for network in self._networks():
            network.requires_grad_(False).eval()
        self.scaling_factor = float(self.vae.config.scaling_factor)
        self.shift_factor = float(getattr(self.vae.config, "shift_factor", None) or 0.0)
        self.vae_factor: int = 2 ** (len(self.vae.config.block_out_channels) - 1)
        # The UNet halves its input once per block but the last: its skip connections need even sides.
        self.stride: int = self.vae_factor * 2 ** (len(self.unet.config.block_out_channels) - 1)
        self._embed = lru_cache(_PROMPT_CACHE)(self._embed_one)
        self.to(self.device)

    @property
    def base_size(self) -> int:
        """Side in pixels that the model was trained at."""
        size = self.unet.config.sample_size
        return int(size if isinstance(size, int) else min(size)) * self.vae_factor

    def to(self, device: torch.device | str) -> Self:
        """Moves everything to the device; returns self."""
        for network in self._networks():
            network.to(device)
        choose_attention(self.unet)
        self.schedule = self.schedule.to(device)
        self._embed.cache_clear()
        return self

    def unload(self) -> None:
        """Gives the memory of the weights back. The object cannot be used afterwards."""
        on_gpu = self.device.type == "cuda"
        self.to("meta")
        if on_gpu:
            torch.cuda.empty_cache()

    def latent_shape(self, images: Tensor) -> tuple[int, int, int]:
        """(C, h, w) of the latents of these images."""
        rows, columns = (-(-side // self.stride) * self.stride for side in images.shape[-2:])
        channels = int(self.vae.config.latent_channels)
        return channels, rows // self.vae_factor, columns // self.vae_factor

    def pad(self, images: Tensor) -> Tensor:
        """Brings sides to multiples of ``stride`` by repeating the last column and row."""
        right, bottom = (-images.shape[side] % self.stride for side in (-1, -2))
        return F.pad(images, (0, right, 0, bottom), mode="replicate")

    def encode_moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the VAE's posterior, not multiplied by the scaling factor."""
        posterior = self.vae.encode((self.pad(images) * 2 - 1).to(self.dtype)).latent_dist
        return posterior.mean.float(), posterior.logvar.float()

    def latents(self, moments: tuple[Tensor, Tensor], noise: Tensor) -> Tensor:
        """The scaled latents that the posterior gives for these standard normal draws."""
        mean, logvar = moments
        return (mean + (logvar / 2).exp() * noise - self.shift_factor) * self.scaling_factor

    def mean_latents(self, images: Tensor) -> Tensor:
        """The scaled latents in the middle of the posterior, without any draw."""
        mean, logvar = self.encode_moments(images)
        return self.latents((mean, logvar), torch.zeros_like(mean))

    def encode(self, images: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Scaled latents, one posterior sample per image from its own generator."""
        noise = normal(generators, self.latent_shape(images)).to(self.device)
        return self.latents(self.encode_moments(images), noise)

    def decode(self, latents: Tensor) -> Tensor:
        """Images of scaled latents, padding included: crop to the original size. Not clamped to [0, 1]."""
        unscaled = latents / self.scaling_factor + self.shift_factor
        images: Tensor = self.vae.decode(unscaled.to(self.dtype)).sample.float()
        return (images + 1) / 2

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the UNet was trained to predict: the noise, or v."""
        return self.schedule.target(latents, noise, t)

    def predict_x0(self, noisy: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """The clean latents that a prediction for these noisy latents implies."""
        return self.schedule.predict_x0(noisy, prediction, t)

    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Last hidden states of the text encoder, ``(B, L, D)`` float32 without graph.

        Every prompt is encoded alone and remembered, so its embedding does not depend on the batch.
        """
        return torch.cat([self._embed(prompt) for prompt in prompts])

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """As ``embed_prompts``, but in one batch, not remembered, and with a graph if the text encoder is trained."""
        length = self.tokenizer.model_max_length
        options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
        tokens = self.tokenizer(list(prompts), **options)
        states: Tensor = self.text_encoder(tokens.input_ids.to(self.device)).last_hidden_state
        return states.float()

    @torch.no_grad()
    def _embed_one(self, prompt: str) -> Tensor:
        return self.encode_prompts([prompt])

    def _run_unet(self, inputs: Tensor, t: Tensor, embeddings: Tensor) -> Tensor:
        output = self.unet(inputs.to(self.dtype), t, encoder_hidden_states=embeddings.to(self.dtype))
        prediction: Tensor = output.sample.float()
        return prediction

    def _networks(self) -> tuple[Any, Any, Any]:
        return self.vae, self.unet, self.text_encoder

    @staticmethod
    @abstractmethod
    def _check_channels(taken: int, latent: int) -> None:
        """Raises ModelError unless a UNet that takes so many channels serves latents of so many."""


class DiffusionModel(LatentModel):
    """A frozen text-to-image model: its UNet sees noisy latents and text, and nothing else."""

    form = "latent text-to-image"

    def predict(self, noisy: Tensor, t: Tensor, embeddings: Tensor) -> Tensor:
        """The UNet's prediction (noise or v, see ``prediction_type``)."""
        return self._run_unet(noisy, t, embeddings)

    @staticmethod
    def _check_channels(taken: int, latent: int) -> None:
        if taken != latent:
            raise ModelError(
                f"the UNet takes {taken} channels and the VAE gives {latent}: inpainting and "
                "depth models are not supported; name a text-to-image model"
            )


LatentModelT = TypeVar("LatentModelT", bound=LatentModel)


def load_model(
    path_or_id: str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> DiffusionModel:
    """Loads a latent diffusion model from a diffusers folder or a hub id.

    Only safetensors weights are read. A hub id that is in the local cache needs no network.

    Args:
        path_or_id: folder with a ``model_index.json``, or ``owner/name``.
        device: where the networks run.
        dtype: of the networks; images and perturbations stay float32 (bf16 cannot hold one 8-bit level).

    Raises:
        ModelError: not found, incomplete, pickled, or of a kind that is not supported.
    """
    return load_latent(DiffusionModel, resolve_folder(path_or_id), dtype).to(device)


def load_latent(kind: type[LatentModelT], folder: Path, dtype: torch.dtype) -> LatentModelT:
    """Loads a model of this class on the CPU; errors as in ``load_model``."""
    check_folder(folder, kind.form)
    # Imported here: they cost seconds, and methods can be listed and configured without them.
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    schedule = NoiseSchedule.from_config(read_json(folder / "scheduler" / "scheduler_config.json"))
    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(folder / "tokenizer"), local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / 'tokenizer'} cannot be loaded: {error}") from error
    parts = LatentParts(
        vae=load_network(AutoencoderKL, folder / "vae", dtype),
        unet=load_network(UNet2DConditionModel, folder / "unet", dtype),
        text_encoder=load_network(CLIPTextModel, folder / "text_encoder", dtype),
        tokenizer=tokenizer,
    )
    return kind(parts, schedule, digest=model_digest(str(folder)))


def choose_attention(unet: Any) -> None:
    """Sets the faster attention for where the UNet is: plain for small latents on the CPU, else fused.

    There the backward pass of fused attention takes twice the time of the plain one (torch 2.13). Plain attention
    keeps a matrix of tokens by tokens per head: 4 MB at 32 x 32 latents, 537 MB for all heads at SD's 64 x 64.
    """
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    size = unet.config.sample_size
    small = max(size if isinstance(size, list | tuple) else (size,)) <= _PLAIN_ATTENTION_SIDE
    unet.set_attn_processor(AttnProcessor() if small and unet.device.type == "cpu" else AttnProcessor2_0())


def _check_parts(parts: LatentParts) -> None:
    unet = parts.unet.config
    if unet.addition_embed_type is not None:
        raise ModelError("the UNet wants pooled or size embeddings (SDXL kind): not supported; name SD 1.x or 2.x")
    if unet.cross_attention_dim != parts.text_encoder.config.hidden_size:
        raise ModelError(
            f"the UNet expects embeddings of width {unet.cross_attention_dim}, the text encoder gives "
            f"{parts.text_encoder.config.hidden_size}; the components belong to different models"
        )
