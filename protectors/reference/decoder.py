"""Trains the autoencoder's decoder on, with the encoder as it is: sharper pictures, and latents stay what they are."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from protectors.reference.checkpoint import Cursor
from protectors.reference.data import CropRule, Photos, centre_crop, crop_batch, order
from protectors.reference.geometry import Geometry
from protectors.reference.learner import Learner, rate_factor, step_generator
from protectors.reference.quality import ssim
from protectors.reference.vae import colour_loss, load_vae, mean_psnr


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderPlan:
    """How the decoder is trained on."""

    # Updates in all; the learning rate reaches zero there.
    steps: int = 2000
    rate: float = 6e-4
    batch: int = 6
    # Weight of structural similarity beside the squared error: more of it costs PSNR.
    structure: float = 0.6
    bf16: bool = True


class DecoderTask:
    """One training of the decoder; `train.run` calls it step by step.

    It can run beside the denoiser's, which sees the encoder only.
    """

    name = "decoder"

    def __init__(
        self, geometry: Geometry, plan: DecoderPlan, photos: tuple[Photos, Photos], *, device: str, vae_folder: Path
    ) -> None:
        self.geometry, self.plan, self.device, self.steps = geometry, plan, device, plan.steps
        self.vae: Any = load_vae(vae_folder).to(device)
        self.learner = Learner({"post": self.vae.post_quant_conv, "decoder": self.vae.decoder}, rate=plan.rate)
        self._photos, held_out = photos
        self._held_out = torch.stack([centre_crop(image, geometry.image_size) for image in held_out.images])

    def train_step(self, cursor: Cursor) -> tuple[float, int]:
        """Makes one update; returns its loss and the number of crops used."""
        rule = CropRule(self.geometry.image_size, scales=(0.5, 1.0))
        picks = order(len(self._photos), seed=cursor.seed, position=cursor.position, batch=self.plan.batch)
        pixels = crop_batch(self._photos, picks, rule, (cursor.seed, cursor.position)).to(self.device)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.plan.bf16):
            with torch.no_grad():
                posterior = self.vae.encode(pixels).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=step_generator(cursor)).to(self.device)
            output = self.vae.decode(posterior.mean.float() + posterior.std.float() * noise).sample
        loss = refinement_loss(output.float(), pixels, self.plan.structure)
        self.learner.update(loss, step=cursor.step, factor=rate_factor(cursor.step, self.steps))
        return loss.item(), len(picks)

    @torch.no_grad()
    def held_out(self) -> dict[str, float]:
        """PSNR of the averaged weights on the held-out photos, in decibel."""
        with self.learner.averaged():
            return {"psnr_db": mean_psnr(self.vae, self._held_out, self.device)}

    def save(self, folder: Path) -> None:
        """Writes the autoencoder with the averaged decoder in float16; `vae` holds float16 afterwards."""
        with self.learner.averaged():
            self.vae.half().save_pretrained(folder, safe_serialization=True)


def refinement_loss(output: Tensor, target: Tensor, structure_weight: float) -> Tensor:
    """Mostly squared error, which is what PSNR measures, with some of L1, structural similarity and colour.

    Args:
        output: `(N, 3, H, W)` in [-1, 1].
        target: the same.
        structure_weight: of 1 - SSIM; the squared error has 5.
    """
    structure = 1 - ssim(output / 2 + 0.5, target / 2 + 0.5).mean()
    error = 5 * F.mse_loss(output, target) + 0.5 * F.l1_loss(output, target)
    total: Tensor = error + structure_weight * structure + 0.5 * colour_loss(output, target)
    return total
