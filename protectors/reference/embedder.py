"""Trains the image embedder by SimCLR (https://arxiv.org/abs/2002.05709): two views of a photo shall be neighbours."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BitImageProcessor, ResNetConfig, ResNetModel

from protectors.reference.checkpoint import Cursor
from protectors.reference.data import Photos, centre_crop, order, resize
from protectors.reference.geometry import Geometry
from protectors.reference.learner import Learner, rate_factor

_VIEW = 4  # first word of the seed sequences; data.py and denoiser.py use 1 to 3
_MEAN, _STD = 0.5, 0.25  # of a pixel in [0, 1], for the input's normalization


def build_embedder(geometry: Geometry) -> Any:
    """Returns an untrained ResNet (https://arxiv.org/abs/1512.03385) with one basic block per stage."""
    channels = geometry.embed_channels
    return ResNetModel(
        ResNetConfig(
            embedding_size=channels[0],
            hidden_sizes=list(channels),
            depths=[1] * len(channels),
            layer_type="basic",
        )
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedPlan:
    """How the embedder is trained."""

    # Updates in all; the learning rate reaches zero there.
    steps: int = 2000
    rate: float = 2e-3
    batch: int = 192
    temperature: float = 0.2
    # Area of a view as a share of the photo's, and how far its centre strays from the photo's, as a share of what
    # fits. Photos show their subject in the middle; a view of a corner shows the surroundings.
    areas: tuple[float, float] = (0.25, 1.0)
    stray: float = 0.5
    # Share of views outside whose middle another photo is put: the same subject at another place.
    swap_share: float = 0.5
    # Largest change of brightness, contrast and saturation. Mild: colour tells one subject from another.
    colour: float = 0.15
    blur_share: float = 0.3
    bf16: bool = True


class EmbedTask:
    """One training of the embedder; `train.run` calls it step by step."""

    name = "embed"

    def __init__(self, geometry: Geometry, plan: EmbedPlan, photos: tuple[Photos, Photos], device: str) -> None:
        self.geometry, self.plan, self.device, self.steps = geometry, plan, device, plan.steps
        self._photos, held_out = photos
        self.model = build_embedder(geometry).to(device).train()
        width = geometry.embed_channels[-1]
        # SimCLR's projection: what the loss makes the network forget, it forgets here.
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 128)).to(device)
        self.learner = Learner({"model": self.model, "head": self.head}, rate=plan.rate, ema_decay=0.99)
        self._probe = self._two_views(held_out, range(len(held_out)), 0)

    def train_step(self, cursor: Cursor) -> tuple[float, int]:
        """Makes one update; returns its loss and the number of photos used."""
        batch = min(self.plan.batch, len(self._photos))
        picks = order(len(self._photos), seed=cursor.seed, position=cursor.position, batch=batch)
        loss = self._loss(self._two_views(self._photos, picks, cursor.seed, cursor.position))
        self.learner.update(loss, step=cursor.step, factor=rate_factor(cursor.step, self.steps))
        return loss.item(), batch

    @torch.no_grad()
    def held_out(self) -> dict[str, float]:
        """Contrastive loss of fixed views of held-out photos, with averaged weights (depends on their number)."""
        with self.learner.averaged():
            return {"held_out_loss": self._loss(self._probe).item()}

    @torch.no_grad()
    def save(self, folder: Path) -> None:
        """Writes a transformers folder with averaged weights in float16; `model` holds float16 afterwards."""
        with self.learner.averaged():
            self._measure_batch_norm()
            self.model.eval().half().save_pretrained(folder, safe_serialization=True)
        side = self.geometry.embed_size
        # As DINO and CLIP do: the shorter side to 8/7 of the input's, then the middle of it.
        processor = BitImageProcessor(
            size={"shortest_edge": round(side * 8 / 7)},
            crop_size={"height": side, "width": side},
            image_mean=[_MEAN] * 3,
            image_std=[_STD] * 3,
        )
        processor.save_pretrained(folder)

    def _measure_batch_norm(self, photos: int = 2048) -> None:
        """Takes the statistics of batch normalization under the averaged weights; training left those of others."""
        norms = [module for module in self.model.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain mean over the batches that follow
        # In random order: batches of one class each would vary less than the photos do.
        picks = order(len(self._photos), seed=0, position=0, batch=min(photos, len(self._photos)))
        for start in range(0, len(picks), 128):
            images = [self._photos.images[pick] for pick in picks[start : start + 128]]
            crops = torch.stack([centre_crop(image, self.geometry.embed_size) for image in images])
            self.model(self._normalize(crops).to(self.device))

    def _loss(self, views: Tensor) -> Tensor:
        """NT-Xent: rows i and i + N are the two views of one photo, all others are strangers."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.plan.bf16):
            features = self.head(self.model(views.to(self.device)).pooler_output.flatten(1))
        unit = F.normalize(features.float(), dim=1)
        alike = unit @ unit.T / self.plan.temperature
        alike.fill_diagonal_(-torch.inf)
        partner = torch.arange(len(unit), device=unit.device).roll(len(unit) // 2)
        return F.cross_entropy(alike, partner)

    def _two_views(self, photos: Photos, picks: Sequence[int], *key: int) -> Tensor:
        views = []
        for view in (0, 1):
            rng = np.random.default_rng([_VIEW, view, *key])
            crops = torch.stack([self._crop(photos.images[pick], rng) for pick in picks])
            # Another donor for each view, or the two could be matched by what is around them.
            views.append(self._disturb(self._swap(crops, crops.roll(1 + view, 0), rng), rng))
        return self._normalize(torch.cat(views))

    def _crop(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        _, height, width = image.shape
        area, ratio = height * width * rng.uniform(*self.plan.areas), np.exp(rng.uniform(-0.29, 0.29))
        tall, wide = min(height, round(np.sqrt(area / ratio))), min(width, round(np.sqrt(area * ratio)))
        top, left = (
            round(room * (0.5 + self.plan.stray * rng.uniform(-0.5, 0.5))) for room in (height - tall, width - wide)
        )
        crop = resize(image[:, top : top + tall, left : left + wide], self.geometry.embed_size)
        return crop.flip(-1) if rng.random() < 0.5 else crop

    def _swap(self, crops: Tensor, donors: Tensor, rng: np.random.Generator) -> Tensor:
        """Puts donors around a soft ellipse in the middle of some crops. Shape: both `(N, 3, S, S)`."""
        count, side = len(crops), crops.shape[-1]
        axis = torch.linspace(-1, 1, side)
        radii = torch.from_numpy(rng.uniform(0.55, 1.0, size=(2, count, 1, 1))).float()
        distance = ((axis.view(1, side, 1) / radii[0]).square() + (axis.view(1, 1, side) / radii[1]).square()).sqrt()
        inside = torch.sigmoid((1 - distance) / 0.05).unsqueeze(1)
        swapped = torch.from_numpy(rng.random(size=(count, 1, 1, 1)) < self.plan.swap_share)
        return torch.where(swapped, inside * crops + (1 - inside) * donors, crops)

    def _disturb(self, crops: Tensor, rng: np.random.Generator) -> Tensor:
        """Changes brightness, contrast and saturation; makes some soft. Shape: (N, 3, S, S) in [0, 1]."""
        count = len(crops)
        low, high = 1 - self.plan.colour, 1 + self.plan.colour
        factors = torch.from_numpy(rng.uniform(low, high, size=(3, count, 1, 1, 1))).float()
        grey = crops.mean(1, keepdim=True)
        crops = grey + (crops - grey) * factors[0]
        mean = crops.mean(dim=(1, 2, 3), keepdim=True)
        crops = ((mean + (crops - mean) * factors[1]) * factors[2]).clamp(0, 1)
        soft = F.avg_pool2d(F.pad(crops, (1, 1, 1, 1), mode="reflect"), 3, stride=1)
        blurred = torch.from_numpy(rng.random(size=(count, 1, 1, 1)) < self.plan.blur_share)
        return torch.where(blurred, soft, crops)

    def _normalize(self, images: Tensor) -> Tensor:
        return (images - _MEAN) / _STD
