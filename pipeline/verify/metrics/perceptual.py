"""LPIPS: how far apart two images look, by the features of AlexNet.

Zhang, Isola, Efros, Shechtman, Wang, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (CVPR
2018), equation 1; version 0.1 of its linear heads, which lie beside this file (BSD-2-Clause). AlexNet's trunk is given
by its user: five convolutions of Krizhevsky, "One weird trick for parallelizing convolutional neural networks" (2014),
with the names and the weights of torchvision's `alexnet`, whose classifier is not needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.verify.digest import folder_digest
from pipeline.verify.metrics.base import GIVEN, Against, Facts, Metric, Reference
from pipeline.verify.metrics.checkpoint import load_weights

HEADS = Path(__file__).with_name("lpips_alex") / "heads.safetensors"
SOURCE = "torchvision's alexnet as safetensors (features.0.weight and so on)"
_CONVOLUTIONS = (0, 3, 6, 8, 10)
"""Places in the trunk; the feature maps are what comes out of the ReLU behind each."""
_SMALLEST = 31  # below, the last pooling has nothing left to pool
# ImageNet's mean and deviation, in the digits of the published code, which are for values in -1..1.
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_EPSILON = 1e-10
_DELTA = 0.1  # ours; not that of cosines: the distance of unlike pictures is about 0.7, and may be above 1


class AlexNetTrunk(nn.Module):
    """The convolutional part of AlexNet."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
        )  # fmt: skip

    def forward(self, images: Tensor) -> list[Tensor]:
        """The five feature maps `(N, C, h, w)` of normalised images `(N, 3, H, W)`."""
        maps = []
        for place, layer in enumerate(self.features):
            images = layer(images)
            if place - 1 in _CONVOLUTIONS:
                maps.append(images)
        return maps


class Lpips(Metric):
    """LPIPS of an image to its original, AlexNet, version 0.1.

    Args:
        folder: with the trunk's weights, one safetensors file.
        device: of the network.

    Raises:
        ModelError: the folder does not hold them.
    """

    needs = Reference.ORIGINALS

    def __init__(self, folder: Path, *, device: str = "cpu") -> None:
        self._trunk = AlexNetTrunk()
        load_weights(self._trunk, folder, SOURCE)
        self._trunk.to(device)
        heads = load_file(HEADS, device=device)
        self._heads = [heads[f"lin{number}.weight"] for number in range(len(_CONVOLUTIONS))]
        self._weights, self._device = folder_digest(folder), device

    @property
    def facts(self) -> Sequence[Facts]:
        """The distance. A protection is better the less it is seen."""
        how = f"AlexNet trunk as given, heads v0.1 bundled; full size; sides of at least {_SMALLEST} pixels"
        return (Facts(name="lpips", better="down", how=how, weights=self._weights, licence=GIVEN, delta=_DELTA),)

    def _score(self, images: Tensor, against: Against) -> dict[str, list[float]]:
        if against.originals is None:
            raise ValueError("lpips needs the originals")
        if min(images.shape[2:]) < _SMALLEST:
            return {}
        return {"lpips": self._distance(images, against.originals).tolist()}

    def _distance(self, images: Tensor, originals: Tensor) -> Tensor:
        pairs = zip(self._heads, self._maps(images), self._maps(originals), strict=True)
        # Over the channels by head, then over the places, then over the layers.
        layers = [torch.einsum("c,nchw->nhw", head, (a - b) ** 2).mean(dim=(1, 2)) for head, a, b in pairs]
        return torch.stack(layers).sum(dim=0).cpu()

    def _maps(self, images: Tensor) -> list[Tensor]:
        shift, scale = (torch.tensor(values, device=self._device).view(3, 1, 1) for values in (_SHIFT, _SCALE))
        maps: list[Tensor] = self._trunk((images.to(self._device).float() / 127.5 - 1 - shift) / scale)
        return [part / (part.square().sum(dim=1, keepdim=True).sqrt() + _EPSILON) for part in maps]
