"""Builds real diffusers components at tiny size, with random weights, as a model folder on disk."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMPipeline, DDPMScheduler, UNet2DConditionModel, UNet2DModel
from transformers import CLIPTextConfig, CLIPTextModel

WIDTH = 32


def save_tiny_model(folder: Path, *, prediction_type: str = "epsilon", channels: int = 4, seed: int = 0) -> Path:
    """Writes a Stable-Diffusion-like folder (under 1 MB; VAE factor 2, stride 4, base size 64)."""
    torch.manual_seed(seed)
    pipeline = "StableDiffusionPipeline" if channels == 4 else "StableDiffusionInpaintPipeline"
    index: dict[str, object] = {"_class_name": pipeline}
    scheduler = DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=prediction_type
    )
    vae = _vae()
    if channels != 4:
        # As narrow as a trained one's: with one step per draw the noise of the posterior would drown the image.
        vae.quant_conv.bias.data[4:] -= 6
    diffusers_parts = {"vae": vae, "unet": _unet(channels), "scheduler": scheduler}
    for name, part in diffusers_parts.items():
        part.save_pretrained(str(folder / name))
        index[name] = ["diffusers", type(part).__name__]
    _text_encoder().save_pretrained(str(folder / "text_encoder"))
    save_tokenizer(folder / "tokenizer")
    index["text_encoder"] = ["transformers", "CLIPTextModel"]
    index["tokenizer"] = ["transformers", "CLIPTokenizer"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def save_tiny_inpainting_model(folder: Path, *, prediction_type: str = "epsilon", seed: int = 0) -> Path:
    """As ``save_tiny_model``, with a UNet that takes nine channels."""
    return save_tiny_model(folder, prediction_type=prediction_type, channels=9, seed=seed)


def save_tiny_pixel_model(
    folder: Path, *, prediction_type: str = "epsilon", channels: int = 3, side: int = 32, seed: int = 0
) -> Path:
    """Writes a folder of an unconditional model of tiles (under 1 MB); six channels have a learned variance."""
    torch.manual_seed(seed)
    unet = UNet2DModel(
        sample_size=side,
        out_channels=channels,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
    )
    unet.conv_out.weight.data *= 4
    scheduler = DDPMScheduler(beta_start=1e-4, beta_end=0.02, prediction_type=prediction_type)
    DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(str(folder))
    return folder


def save_tokenizer(folder: Path) -> None:
    """A CLIP tokenizer over single characters, in the files of the published checkpoints."""
    folder.mkdir(parents=True)
    letters = [chr(code) for code in range(33, 127)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    vocab.write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    merges.write_text("#version: 0.2\n")
    settings = {"model_max_length": 16, "tokenizer_class": "CLIPTokenizer", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=1.0,
    )


def _unet(channels: int) -> UNet2DConditionModel:
    unet = UNet2DConditionModel(
        sample_size=32,
        in_channels=channels,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        cross_attention_dim=WIDTH,
    )
    # Random weights predict almost nothing, whatever the input; louder ones make the loss depend on it.
    unet.conv_out.weight.data *= 4
    unet.conv_in.weight.data[:, 5:] *= 8  # nor would the image be heard beside the noise of an inpainting model
    return unet


def _text_encoder() -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=190,
            hidden_size=WIDTH,
            intermediate_size=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=188,
            eos_token_id=189,
            pad_token_id=189,
        )
    )
