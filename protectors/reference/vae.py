"""Trains the autoencoder: pixels to latents at an eighth of the side, and back."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from protectors.reference.checkpoint import Cursor
from protectors.reference.data import CropRule, Photos, centre_crop, crop_batch, order, random_crop
from protectors.reference.fragility import FragilityGoal, fragility_loss
from protectors.reference.geometry import Geometry
from protectors.reference.learner import Learner, rate_factor, step_generator
from protectors.reference.quality import psnr, ssim


def build_vae(geometry: Geometry) -> Any:
    """Returns an untrained AutoencoderKL with Stable Diffusion's block types."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=geometry.vae_channels,
        layers_per_block=1,
        latent_channels=geometry.latent_channels,
        norm_num_groups=geometry.vae_norm_groups,
        sample_size=geometry.image_size,
    )


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 for the level, gradients at two scales for edges, structural similarity for texture, and colour twice.

    Shape: both `(N, 3, H, W)` in [-1, 1].
    """
    edges = _gradient_loss(output, target) + _gradient_loss(F.avg_pool2d(output, 2), F.avg_pool2d(target, 2))
    structure = 1 - ssim(output / 2 + 0.5, target / 2 + 0.5).mean()
    total: Tensor = F.l1_loss(output, target) + 0.25 * edges + 0.2 * structure + colour_loss(output, target)
    return total


def colour_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 of what is left of a pixel without its brightness, at full and at an eighth of the size.

    Without it nearly all of the latents go to brightness: pink came back as orange (seen), at a good PSNR, because
    photos have little colour. Shape: both `(N, 3, H, W)`.
    """
    difference = output - target
    chroma = difference - difference.mean(dim=1, keepdim=True)
    return chroma.abs().mean() + 2 * F.avg_pool2d(chroma, 8).abs().mean()


def _gradient_loss(output: Tensor, target: Tensor) -> Tensor:
    difference = output - target
    across, down = difference.diff(dim=-1), difference.diff(dim=-2)
    return across.abs().mean() + down.abs().mean()


@dataclass(frozen=True, slots=True, kw_only=True)
class VaePlan:
    """How the autoencoder is trained."""

    # Updates in all; the learning rate reaches zero there.
    steps: int = 7000
    rate: float = 1.5e-3
    # Share of the updates on crops of half the side, which cost a quarter.
    coarse: float = 0.85
    batch_coarse: int = 16
    batch_fine: int = 6
    # Per pixel value, as in latent diffusion: only keeps the latents from growing without bound.
    kl_weight: float = 1e-6
    # Whiten the latents before this update, and again at the end. Left alone, training ends with standard deviations
    # from 15 down to 0.03 along the principal axes (measured), and bfloat16 loses the small ones.
    whiten_at: int = 2000
    # From this update on, and with this weight, the encoder is also trained to be fragile: see fragility.py.
    fragile_from: int = 4000
    fragility: float = 0.5
    fragile_shift: float = 1.0
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
        if cursor.step == self.plan.whiten_at:
            whitening = self._whitening(self.vae)
            self.learner.rewrite(lambda: whitening.fold(self.vae))
        coarse = cursor.step < self.plan.coarse * self.plan.steps
        batch = self.plan.batch_coarse if coarse else self.plan.batch_fine
        pixels = self._batch(cursor, batch, coarse=coarse).to(self.device)
        generator = step_generator(cursor)
        posterior = self._encode(pixels)
        mean, std, logvar = posterior.mean.float(), posterior.std.float(), posterior.logvar.float()
        noise = torch.randn(mean.shape, generator=generator).to(self.device)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.plan.bf16):
            output = self.vae.decode(mean + std * noise).sample
        kl = 0.5 * (mean.square() + std.square() - 1 - logvar).sum() / pixels.numel()
        loss = reconstruction_loss(output.float(), pixels) + self.plan.kl_weight * kl
        if cursor.step >= self.plan.fragile_from:
            goal = FragilityGoal(shift=self.plan.fragile_shift)
            loss = loss + self.plan.fragility * fragility_loss(
                lambda images: self._encode(images).mean.float(), pixels, goal, generator
            )
        self.learner.update(loss, step=cursor.step, factor=rate_factor(cursor.step, self.steps))
        return loss.item(), batch

    def _encode(self, pixels: Tensor) -> Any:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.plan.bf16):
            return self.vae.encode(pixels).latent_dist

    def _batch(self, cursor: Cursor, batch: int, *, coarse: bool) -> Tensor:
        size = self.geometry.image_size
        rule = CropRule(size // 2, scales=(0.25, 0.5)) if coarse else CropRule(size, scales=(0.5, 1.0))
        picks = order(len(self._photos), seed=cursor.seed, position=cursor.position, batch=batch)
        return crop_batch(self._photos, picks, rule, (cursor.seed, cursor.position))

    @torch.no_grad()
    def held_out(self) -> dict[str, float]:
        """PSNR of the averaged weights on the held-out photos, in decibel."""
        with self.learner.averaged():
            return {"psnr_db": mean_psnr(self.vae, self._held_out, self.device)}

    @torch.no_grad()
    def finished(self) -> Any:
        """Returns the autoencoder with averaged weights, latents whitened; its scaling factor is 1.

        The denoiser then meets the same share of noise in every direction of latent space, and fine detail,
        whose latents are small before, weighs as much as brightness.
        """
        with self.learner.averaged():
            vae = build_vae(self.geometry).to(self.device)
            vae.load_state_dict(self.vae.state_dict())
        self._whitening(vae.eval()).fold(vae)
        vae.register_to_config(scaling_factor=1.0)
        return vae

    def _whitening(self, vae: Any, samples: int = 1024) -> "Whitening":
        rule = CropRule(self.geometry.image_size, scales=(0.6, 1.0))
        few = self._photos.spread(samples).images
        crops = torch.stack([random_crop(image, rule, (0, place)) for place, image in enumerate(few)])
        return Whitening.of(vae, (crops * 2 - 1).to(self.device))


@dataclass(frozen=True, slots=True, kw_only=True)
class Whitening:
    """An affine map of latents after which they have mean 0 and covariance I, and its inverse."""

    centre: Tensor  # (C,)
    there: Tensor  # (C, C)
    back: Tensor  # (C, C)
    variance: Tensor  # (C,): mean spread of the posterior after the map

    @classmethod
    @torch.no_grad()
    def of(cls, vae: Any, crops: Tensor) -> "Whitening":
        """Measures the latents of crops, `(N, 3, H, W)` in [-1, 1]."""
        posteriors = [vae.encode(part).latent_dist for part in torch.split(crops, 16)]
        means = torch.cat([posterior.mean for posterior in posteriors]).transpose(0, 1).flatten(1).double()
        variances = torch.cat([posterior.var for posterior in posteriors]).mean(dim=(0, 2, 3)).double()
        spread, axes = torch.linalg.eigh(torch.cov(means))
        # Symmetric (ZCA) rather than along the principal axes: the map nearest to none, without a choice of signs.
        there = axes @ torch.diag(spread.rsqrt()) @ axes.T
        back = axes @ torch.diag(spread.sqrt()) @ axes.T
        return cls(centre=means.mean(dim=1), there=there, back=back, variance=there.square() @ variances)

    @torch.no_grad()
    def fold(self, vae: Any) -> None:
        """Puts the map into the weights around the latents. Reconstructions stay the same.

        The encoder's last and the decoder's first convolution take the linear parts, so that no layer between
        them has outputs of very different size: bfloat16 would round the small ones away. The posterior's
        spread becomes one number per channel.
        """
        channels = len(self.centre)
        out, quant = vae.encoder.conv_out, vae.quant_conv
        mean_of = self.there @ quant.weight[:channels, :, 0, 0].double()
        bias = mean_of @ out.bias.double() + self.there @ (quant.bias[:channels].double() - self.centre)
        weight = torch.einsum("ij,jkhw->ikhw", mean_of, out.weight.double())
        out.weight.copy_(torch.cat([weight, torch.zeros_like(weight)]))
        out.bias.copy_(torch.cat([bias, self.variance.log()]))
        quant.weight.copy_(torch.eye(2 * channels)[:, :, None, None])
        quant.bias.zero_()
        into, post = vae.decoder.conv_in, vae.post_quant_conv
        back = post.weight[:, :, 0, 0].double() @ self.back
        # conv_in pads with zeros after the bias, so the bias stays in front of it, in the new units.
        offset = post.bias.double() + post.weight[:, :, 0, 0].double() @ self.centre
        into.weight.copy_(torch.einsum("ijhw,jk->ikhw", into.weight.double(), back))
        post.bias.copy_(torch.linalg.solve(back, offset))
        post.weight.copy_(torch.eye(channels)[:, :, None, None])


def load_vae(folder: Path) -> Any:
    """Loads an autoencoder in float32 from a local folder, safetensors only."""
    return AutoencoderKL.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, local_files_only=True)


@torch.no_grad()
def mean_psnr(vae: Any, images: Tensor, device: str) -> float:
    """Mean PSNR in decibel of reconstructed images, `(N, 3, H, W)` in [0, 1]."""
    parts = torch.split(images, 16)
    return torch.cat([psnr(reconstruct(vae, part.to(device)).cpu(), part) for part in parts]).mean().item()


def reconstruct(vae: Any, images: Tensor) -> Tensor:
    """Encodes and decodes images in [0, 1] without sampling the posterior."""
    latents = vae.encode(images * 2 - 1).latent_dist.mode()
    output: Tensor = vae.decode(latents).sample
    return (output / 2 + 0.5).clamp(0, 1)
