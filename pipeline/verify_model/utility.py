"""What a model can do besides what it was protected against: denoise photos it never saw, and draw other things."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pipeline.ids import sha256_hex
from pipeline.verify.bootstrap import Floats
from pipeline.verify.customizers.base import sample
from pipeline.verify.embed import Embedder
from pipeline.verify_model.tasks import Denoising, Drawing
from protectors.randomness import streams
from protectors.reference.data import centre_crop
from protectors.schedule import NoiseSchedule

TIMES = 4
"""Timesteps at which every held-out photo is denoised."""
_TOGETHER = 16


@torch.no_grad()
def held_out_errors(task: Denoising, pipeline: Any) -> Floats:
    """Mean squared errors `(photos, TIMES)` of what the model predicts: the noise, or v.

    Noise and timesteps follow from the photo's place and the seed, so those of two models are paired. The timesteps of
    a photo are one of each quarter of the schedule.

    Raises:
        RuntimeError: an error is not finite.
    """
    device, photos = pipeline.device, task.photos
    schedule = NoiseSchedule.from_config(pipeline.scheduler.config).to(device)
    scale = float(pipeline.vae.config.scaling_factor)
    found = []
    for start in range(0, len(photos), _TOGETHER):
        places = range(start, min(len(photos), start + _TOGETHER))
        crops = torch.stack([centre_crop(photos.images[place], task.side) for place in places])
        latents = pipeline.vae.encode((crops * 2 - 1).to(device)).latent_dist.mean * scale
        captions = [photos.captions[place] for place in places]
        tokens = pipeline.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        text = pipeline.text_encoder(tokens.to(device))[0]
        draws = [streams([task.seed], f"held-out/{place}")[0] for place in places]
        columns = []
        for quarter in range(TIMES):
            low, high = (schedule.timesteps * bound // TIMES for bound in (quarter, quarter + 1))
            times = torch.cat([torch.randint(low, high, (1,), generator=draw) for draw in draws]).to(device)
            noise = torch.stack([torch.randn(latents.shape[1:], generator=draw) for draw in draws]).to(device)
            predicted = pipeline.unet(schedule.add_noise(latents, noise, times), times, text).sample
            errors = (predicted - schedule.target(latents, noise, times)).square().mean(dim=(1, 2, 3))
            columns.append(errors.double().cpu())
        found.append(torch.stack(columns, dim=1))
    return _finite(torch.cat(found).numpy(), "the denoising loss")


def draw(task: Drawing, pipeline: Any, embedder: Embedder) -> Floats:
    """Embeddings `(prompts * count, D)` of drawn images, of length 1, prompt by prompt.

    Raises:
        RuntimeError: an image is not finite.
    """
    rows = []
    for prompt in task.prompts:
        seed = int(sha256_hex(f"{task.seed}/{task.noise}/{prompt}")[:8], 16)
        images = sample(pipeline, prompt, task.count, seed=seed, sampling=task.sampling)
        if not bool(images.isfinite().all()):
            raise RuntimeError(f"the model draws numbers that are not finite of {prompt!r}")
        rows.append(embedder.embed(images).double())
    return torch.cat(rows).numpy()


def _finite(values: Floats, what: str) -> Floats:
    if not np.isfinite(values).all():
        raise RuntimeError(f"{what} is not finite")
    return values
