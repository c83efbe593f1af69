"""Trains the pixel-space model: an unconditional DDPM on tiles, the prior that purifiers pull a picture back to."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor

from protectors.reference.checkpoint import Cursor
from protectors.reference.data import CropRule, Photos, order, random_crop
from protectors.reference.geometry import TILE_SCHEDULE, TRAIN_STEPS, Geometry
from protectors.reference.learner import Learner, rate_factor, step_generator


def build_tile_unet(geometry: Geometry) -> Any:
    """Returns an untrained UNet2DModel; only the coarsest level and the middle have attention."""
    levels = len(geometry.tile_channels) - 1
    return UNet2DModel(
        sample_size=geometry.tile_size,
        block_out_channels=geometry.tile_channels,
        layers_per_block=1,
        norm_num_groups=geometry.tile_norm_groups,
        attention_head_dim=geometry.tile_channels[-1],
        down_block_types=("DownBlock2D",) * levels + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * levels,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TilePlan:
    """How the pixel-space model is trained."""

    # Updates in all; the learning rate reaches zero there.
    steps: int = 2000
    rate: float = 8e-4
    batch: int = 16
    # Share of the updates' samples at t < `early`, where purifiers work; the rest is uniform over all t.
    early_share: float = 0.5
    early: int = 200
    # Side of a tile as a share of the photo's short side, which is 144 px or more: near the tile's own 64 pixels.
    scales: tuple[float, float] = (0.35, 0.7)
    bf16: bool = True


class TileTask:
    """One training of the pixel-space model; `train.run` calls it step by step."""

    name = "ddpm"

    def __init__(self, geometry: Geometry, plan: TilePlan, photos: tuple[Photos, Photos], device: str) -> None:
        self.geometry, self.plan, self.device, self.steps = geometry, plan, device, plan.steps
        self._photos, held_out = photos
        self.unet = build_tile_unet(geometry).to(device)
        self.learner = Learner({"unet": self.unet}, rate=plan.rate)
        self._alphas = DDPMScheduler(**TILE_SCHEDULE).alphas_cumprod.to(device)
        self._probe = self._tiles(held_out, range(len(held_out)), (0,))

    def train_step(self, cursor: Cursor) -> tuple[float, int]:
        """Makes one update; returns its loss and the number of tiles used."""
        plan = self.plan
        picks = order(len(self._photos), seed=cursor.seed, position=cursor.position, batch=plan.batch)
        tiles = self._tiles(self._photos, picks, (cursor.seed, cursor.position))
        generator = step_generator(cursor)
        noise = torch.randn(tiles.shape, generator=generator)
        times = torch.randint(0, TRAIN_STEPS, (len(picks),), generator=generator)
        early = torch.rand(len(picks), generator=generator) < plan.early_share
        times = torch.where(early, times % plan.early, times)
        loss = self._errors(tiles, noise, times).mean()
        self.learner.update(loss, step=cursor.step, factor=rate_factor(cursor.step, self.steps))
        return loss.item(), len(picks)

    @torch.no_grad()
    def held_out(self) -> dict[str, float]:
        """Mean squared error of the noise on held-out tiles at 0 < t < `early`, with averaged weights."""
        noise = torch.randn(self._probe.shape, generator=torch.Generator().manual_seed(0))
        times = torch.linspace(1, self.plan.early - 1, len(noise)).long()
        # Neighbours in the file are of one class; shuffled, every class meets early and late times.
        times = times[torch.randperm(len(times), generator=torch.Generator().manual_seed(1))]
        with self.learner.averaged():
            parts = zip(*(torch.split(tensor, 32) for tensor in (self._probe, noise, times)), strict=True)
            return {"held_out_loss": torch.cat([self._errors(*part) for part in parts]).mean().item()}

    def save(self, folder: Path) -> None:
        """Writes a DDPMPipeline folder with averaged weights in float16; `unet` holds float16 afterwards."""
        with self.learner.averaged():
            scheduler = DDPMScheduler(**TILE_SCHEDULE, variance_type="fixed_small", clip_sample=True)
            DDPMPipeline(unet=self.unet.half(), scheduler=scheduler).save_pretrained(folder, safe_serialization=True)

    def _tiles(self, photos: Photos, picks: Any, key: tuple[int, ...]) -> Tensor:
        rule = CropRule(self.geometry.tile_size, scales=self.plan.scales)
        crops = [random_crop(photos.images[pick], rule, (*key, place)) for place, pick in enumerate(picks)]
        return torch.stack(crops) * 2 - 1

    def _errors(self, tiles: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        tiles, noise, times = tiles.to(self.device), noise.to(self.device), times.to(self.device)
        alphas = self._alphas[times].view(-1, 1, 1, 1)
        noisy = alphas.sqrt() * tiles + (1 - alphas).sqrt() * noise
        with torch.autocast(self.device, torch.bfloat16, enabled=self.plan.bf16):
            prediction = self.unet(noisy, times).sample
        errors: Tensor = (prediction.float() - noise).square().mean(dim=(1, 2, 3))
        return errors
