"""Trains the autoencoder: pixels to four latent channels at an eighth of the side, and back."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from protectors.reference.checkpoint import Cursor
from protectors.reference.data import CropRule, Photos, centre_crop, order, random_crop
from protectors.reference.geometry import Geometry
from protectors.reference.learner import Learner, rate_factor
from protectors.reference.quality import psnr


def build_vae(geometry: Geometry) -> Any:
    """Returns an untrained AutoencoderKL with Stable Diffusion's block types."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=geometry.vae_channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=geometry.norm_groups,
        sample_size=geometry.image_size,
    )


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 for the level, gradients at three scales for edges, focal frequency loss for what is still missing.

    Shape: both `(N, 3, H, W)` in [-1, 1].
    """
    edges = torch.zeros((), device=output.device)
    small_output, small_target = output, target
    for _ in range(3):
        edges = edges + _gradient_loss(small_output, small_target) / 3
        small_output, small_target = F.avg_pool2d(small_output, 2), F.avg_pool2d(small_target, 2)
    frequency = _focal_frequency_loss(output, target)
    total: Tensor = F.l1_loss(output, target) + 0.5 * edges + 4.0 * frequency
    return total


def _gradient_loss(output: Tensor, target: Tensor) -> Tensor:
    difference = output - target
    across, down = difference.diff(dim=-1), difference.diff(dim=-2)
    return across.abs().mean() + down.abs().mean()


def _focal_frequency_loss(output: Tensor, target: Tensor) -> Tensor:
    """Focal frequency loss (https://arxiv.org/abs/2012.12821), alpha 1, whole image as one patch."""
    spectrum = torch.fft.rfft2(output - target, norm="ortho")
    squared = spectrum.real.square() + spectrum.imag.square()
    weight = squared.detach().sqrt()
    weight = weight / weight.amax(dim=(-2, -1), keepdim=True).clamp_min(1e-8)
    loss: Tensor = (weight * squared).mean()
    return loss


@dataclass(frozen=True, slots=True, kw_only=True)
class VaePlan:
    """How the autoencoder is trained."""

    # Updates in all; the learning rate reaches zero there.
    steps: int = 8000
    rate: float = 1e-3
    # Share of the updates on crops of half the side, which cost a quarter.
    coarse: float = 0.7
    batch_coarse: int = 8
    batch_fine: int = 4
    # Per pixel value, as in latent diffusion: only keeps the latents from growing without bound.
    kl_weight: float = 1e-6
    bf16: bool = True


class VaeTask:
    """One training of the autoencoder; `train.run` calls it step by step."""

    name = "vae"

    def __init__(self, geometry: Geometry, plan: VaePlan, train: Photos, held_out: Photos, device: str) -> None:
        self.geometry, self.plan, self.device = geometry, plan, device
        self.steps = plan.steps
        self.vae = build_vae(geometry).to(device)
        self.learner = Learner({"vae": self.vae}, rate=plan.rate)
        self._photos = train
        self._held_out = torch.stack([centre_crop(image, geometry.image_size) for image in held_out.images])

    def train_step(self, cursor: Cursor) -> tuple[float, int]:
        """Makes one update; returns its loss and the number of crops used."""
        coarse = cursor.step < self.plan.coarse * self.plan.steps
        batch = self.plan.batch_coarse if coarse else self.plan.batch_fine
        pixels = self._batch(cursor, batch, coarse=coarse).to(self.device)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.plan.bf16):
            posterior = self.vae.encode(pixels).latent_dist
        mean, std, logvar = posterior.mean.float(), posterior.std.float(), posterior.logvar.float()
        noise = torch.randn(mean.shape, generator=step_generator(cursor)).to(self.device)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.plan.bf16):
            output = self.vae.decode(mean + std * noise).sample
        kl = 0.5 * (mean.square() + std.square() - 1 - logvar).sum() / pixels.numel()
        loss = reconstruction_loss(output.float(), pixels) + self.plan.kl_weight * kl
        self.learner.update(loss, step=cursor.step, factor=rate_factor(cursor.step, self.steps))
        return loss.item(), batch

    def _batch(self, cursor: Cursor, batch: int, *, coarse: bool) -> Tensor:
        size = self.geometry.image_size
        rule = CropRule(size // 2, scales=(0.2, 0.5)) if coarse else CropRule(size)
        picks = order(len(self._photos), seed=cursor.seed, position=cursor.position, batch=batch)
        crops = [
            random_crop(self._photos.images[pick], rule, (cursor.seed, cursor.position + i))
            for i, pick in enumerate(picks)
        ]
        return torch.stack(crops) * 2 - 1

    @torch.no_grad()
    def held_out(self) -> dict[str, float]:
        """PSNR of the averaged weights on the held-out photos, in decibel."""
        with self.learner.averaged():
            pairs = [
                (reconstruct(self.vae, part.to(self.device)).cpu(), part) for part in torch.split(self._held_out, 16)
            ]
        return {"psnr_db": torch.cat([psnr(output, part) for output, part in pairs]).mean().item()}

    @torch.no_grad()
    def finished(self, samples: int = 512) -> Any:
        """Returns the autoencoder with averaged weights and the scaling factor measured on training crops."""
        rule = CropRule(self.geometry.image_size)
        picks = order(len(self._photos), seed=0, position=0, batch=min(samples, len(self._photos)))
        with self.learner.averaged():
            vae = build_vae(self.geometry).to(self.device)
            vae.load_state_dict(self.vae.state_dict())
        crops = torch.stack([random_crop(self._photos.images[pick], rule, (0, pick)) for pick in picks]) * 2 - 1
        latents = torch.cat([vae.encode(part.to(self.device)).latent_dist.mode() for part in torch.split(crops, 16)])
        vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
        return vae.eval()


def reconstruct(vae: Any, images: Tensor) -> Tensor:
    """Encodes and decodes images in [0, 1] without sampling the posterior."""
    latents = vae.encode(images * 2 - 1).latent_dist.mode()
    output: Tensor = vae.decode(latents).sample
    return (output / 2 + 0.5).clamp(0, 1)


def step_generator(cursor: Cursor) -> torch.Generator:
    """Returns a generator for the noise of one step; on the processor, so that every device draws the same."""
    return torch.Generator().manual_seed(cursor.seed * 1_000_003 + cursor.step)
