"""Measures a reference model on photos it has not seen: `python -m protectors.reference.evaluate --help`."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from protectors.reference import NANO_SD, reference_path
from protectors.reference.data import Photos, centre_crop, load_photos
from protectors.reference.noise import NoisePredictor, Probe
from protectors.reference.quality import psnr, ssim
from protectors.reference.vae import reconstruct


@torch.no_grad()
def fidelity(vae: Any, photos: Photos, size: int) -> dict[str, float]:
    """Mean PSNR and SSIM of decoded latents (8 bit) against the centres of the photos at `size` pixels."""
    decibels, similarities = [], []
    for start in range(0, len(photos), 8):
        target = torch.stack([centre_crop(image, size) for image in photos.images[start : start + 8]])
        output = (reconstruct(vae, target) * 255).round() / 255
        decibels.append(psnr(output, target))
        similarities.append(ssim(output, target))
    return {
        f"psnr_db_{size}px": round(torch.cat(decibels).mean().item(), 2),
        f"ssim_{size}px": round(torch.cat(similarities).mean().item(), 4),
    }


def latent_shift(vae: Any, photos: Photos, size: int, *, eps: float = 8 / 255, steps: int = 20) -> float:
    """Mean relative change of the latents, |E(x + d) - E(x)| / |E(x)|, that projected gradient ascent reaches.

    A reference model whose latents hardly move would make every protection look weak.
    """
    shifts = []
    for start in range(0, len(photos), 8):
        clean = torch.stack([centre_crop(image, size) for image in photos.images[start : start + 8]])
        with torch.no_grad():
            before = vae.encode(clean * 2 - 1).latent_dist.mode()
        generator = torch.Generator().manual_seed(start)
        change = (torch.rand(clean.shape, generator=generator) * 2 - 1) * eps
        for _ in range(steps):
            change.requires_grad_(True)
            moved = _shift(vae, (clean + change).clamp(0, 1), before)
            (gradient,) = torch.autograd.grad(moved.sum(), change)
            change = (change.detach() + eps / 8 * gradient.sign()).clamp(-eps, eps)
        with torch.no_grad():
            shifts.append(_shift(vae, (clean + change).clamp(0, 1), before))
    return round(torch.cat(shifts).mean().item(), 4)


def _shift(vae: Any, images: Tensor, before: Tensor) -> Tensor:
    after: Tensor = vae.encode(images * 2 - 1).latent_dist.mode()
    shift: Tensor = (after - before).flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1)
    return shift


def evaluate(model: Path, data: Path, subjects: Path | None, count: int) -> dict[str, float]:
    """Returns all figures of the model card."""
    pipeline = StableDiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32, safety_checker=None)
    vae = pipeline.vae.requires_grad_(False)
    size = 8 * pipeline.unet.config.sample_size
    photos = load_photos(data, held_out=True, limit=count)
    figures: dict[str, float] = {"photos": len(photos), **fidelity(vae, photos, size)}
    # The training photos have about 150 pixels; only photos that have 256 say something about 256.
    if subjects is not None:
        large = load_photos(subjects, held_out=None, limit=count)
        figures |= {"subject_photos": len(large), **fidelity(vae, large, 2 * size)}
    few = Photos(photos.images[:: max(1, len(photos) // 16)], [])
    figures["latent_shift_8_of_255"] = latent_shift(vae, few, size)
    predictor = NoisePredictor(pipeline.unet, pipeline.text_encoder, pipeline.tokenizer, device="cpu", bf16=False)
    figures["held_out_loss"] = round(Probe.of(photos, vae, size, "cpu").loss(predictor), 4)
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    line = argparse.ArgumentParser(prog="python -m protectors.reference.evaluate", description=__doc__)
    line.add_argument("--model", type=Path, default=reference_path(NANO_SD), help="diffusers folder (the shipped one)")
    line.add_argument("--data", type=Path, required=True, help="the Parquet it was trained on; its held-out rows count")
    line.add_argument("--subjects", type=Path, help="Parquet of larger photos, for the figures at twice the size")
    line.add_argument("--count", type=int, default=256, help="photos at most, spread over the file (%(default)s)")
    options = line.parse_args(arguments)
    print(json.dumps(evaluate(options.model, options.data, options.subjects, options.count), indent=1))


if __name__ == "__main__":
    main()
