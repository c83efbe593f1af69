"""nano-sd's denoiser: its loss on photos it has not seen, and what it draws."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from pipeline.laboratory.figures import Figure
from protectors.reference.data import Photos
from protectors.reference.noise import NoisePredictor, Probe

MODEL = "nano-sd"
CAPTIONS = (
    "a photo of a airplanes",
    "a photo of a motorbikes",
    "a photo of a sunflower",
    "a photo of a leopards",
    "a photo of a watch",
    "a photo of a bonsai",
    "a photo of a grand piano",
    "a photo of a car side",
)


def losses(pipeline: Any, train: Photos, held_out: Photos) -> list[Figure]:
    """Denoising loss (mean squared error of the noise; 1 is what predicting nothing scores) and its gap."""
    predictor = NoisePredictor(pipeline.unet, pipeline.text_encoder, pipeline.tokenizer, device="cpu", bf16=False)
    size = 8 * pipeline.unet.config.sample_size
    seen, unseen = (
        Probe.of(photos, pipeline.vae, size, "cpu", bf16=False).loss(predictor) for photos in (train, held_out)
    )
    sample = f"{len(held_out)} held-out photos, 4 times each"
    gap = unseen / seen - 1
    return [
        Figure(model=MODEL, name="denoising loss, held out", value=unseen, sample=sample),
        Figure(
            model=MODEL,
            name="denoising loss, held out over training photos, minus 1",
            value=gap,
            sample=f"{len(train)} photos of either kind",
            at_most=0.10,
        ),
    ]


@torch.no_grad()
def samples(pipeline: Any, captions: Sequence[str], each: int, *, steps: int, guidance: float, seed: int = 0) -> Tensor:
    """Images `(len(captions) * each, 3, S, S)` in [0, 1], caption by caption."""
    rows = []
    for caption in captions:
        output = pipeline(
            caption,
            num_images_per_prompt=each,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed + number) for number in range(each)],
            output_type="np",
        )
        rows.append(torch.from_numpy(np.asarray(output.images)).permute(0, 3, 1, 2))
    return torch.cat(rows)


def contact_sheet(images: Tensor, labels: Sequence[str], file: Path) -> Path:
    """Draws one labelled row per label, as many images in each as there are; returns `file`."""
    each, side, strip = len(images) // len(labels), images.shape[-1], 14
    sheet = Image.new("RGB", (each * side, len(labels) * (side + strip)), "white")
    draw = ImageDraw.Draw(sheet)
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    for row, label in enumerate(labels):
        top = row * (side + strip)
        draw.text((3, top + 1), label, fill="black")
        for column in range(each):
            sheet.paste(Image.fromarray(pixels[row * each + column]), (column * side, top + strip))
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file)
    return file
