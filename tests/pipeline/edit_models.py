"""Tiny checkpoints of every kind that an editor needs, and pictures to edit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    UNet2DConditionModel,
)
from torch import Tensor

from pipeline.verify.attack_models import ModelKind
from tests.protectors.tiny import save_tiny_model

CHANNELS = {ModelKind.INPAINT: 9, ModelKind.INSTRUCT: 8}
CLASSES = {
    ModelKind.INPAINT: StableDiffusionInpaintPipeline,
    ModelKind.INSTRUCT: StableDiffusionInstructPix2PixPipeline,
}


def save_edit_models(root: Path) -> dict[ModelKind, str]:
    """Writes a text-to-image, an inpainting and an instruction model with random weights; their folders by kind."""
    latent = save_tiny_model(root / "latent")
    index = {"_diffusers_version": diffusers.__version__, **json.loads((latent / "model_index.json").read_text())}
    (latent / "model_index.json").write_text(json.dumps(index))
    found = {ModelKind.LATENT: str(latent)}
    for kind, channels in CHANNELS.items():
        folder = root / kind
        shutil.copytree(latent, folder)
        save_unet(folder, in_channels=channels)
        (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": CLASSES[kind].__name__}))
        found[kind] = str(folder)
    return found


def save_eight_channel_model(folder: Path) -> str:
    """A text-to-image model like the tiny one, with eight latent channels."""
    save_tiny_model(folder)
    save_unet(folder, in_channels=8, out_channels=8)
    vae = {**AutoencoderKL.load_config(str(folder / "vae")), "latent_channels": 8}
    AutoencoderKL.from_config(vae).save_pretrained(str(folder / "vae"))
    return str(folder)


def save_unet(folder: Path, **changes: int) -> None:
    """Replaces a folder's UNet by one of other channels, with random weights as loud as the tiny model's."""
    torch.manual_seed(1)
    unet = UNet2DConditionModel.from_config({**UNet2DConditionModel.load_config(str(folder / "unet")), **changes})
    unet.conv_out.weight.data *= 4
    unet.save_pretrained(str(folder / "unet"))


def pictures(count: int, height: int = 32, width: int = 40) -> Tensor:
    """Smooth pictures, all different: uint8 `(count, 3, height, width)`."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    return (smooth * 255).round().to(torch.uint8)


def middle_masks(images: Tensor) -> Tensor:
    """A rectangle to repaint in each, `(B, 1, H, W)`; it reaches into the right half."""
    masks = torch.zeros_like(images[:, :1])
    height, width = images.shape[2:]
    masks[:, :, height // 4 : height // 2, width // 3 : width - 3] = 1
    return masks
