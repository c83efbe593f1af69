"""The Inception network of the Fréchet distance, filled from a local file.

Szegedy, Vanhoucke, Ioffe, Shlens, Wojna, "Rethinking the Inception Architecture for Computer Vision" (CVPR 2016), as
trained in TensorFlow on 2015-12-05 and used by Heusel et al. (NeurIPS 2017). That graph differs from torchvision's
`inception_v3` in three points: averages leave the border out, the last block takes a maximum, and images are resized
by sampling at i·(H/299), without regard to half pixels. Names of weights are those of torch-fidelity's
`weights-inception-2015-12-05` and of pytorch-fid; the classifier is not needed. These packages themselves cannot be
used here: they import torchvision.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.verify.digest import folder_digest
from pipeline.verify.metrics.checkpoint import load_weights

FEATURES = 2048
SOURCE = "torch-fidelity's or pytorch-fid's weights-inception-2015-12-05, as safetensors"
_SIDE = 299

Layer = tuple[str, int, tuple[int, int], int]
"""Name, channels, kernel, stride; with stride 1 inside a block the size is kept."""

_mean = partial(nn.AvgPool2d, 3, stride=1, padding=1, count_include_pad=False)
_largest = partial(nn.MaxPool2d, 3, stride=1, padding=1)


def _layer(name: str, channels: int, height: int = 1, width: int | None = None, *, stride: int = 1) -> Layer:
    return name, channels, (height, width or height), stride


def _block_a(pooled: int) -> list[list[Layer]]:
    return [
        [_layer("branch1x1", 64)],
        [_layer("branch5x5_1", 48), _layer("branch5x5_2", 64, 5)],
        [_layer("branch3x3dbl_1", 64), _layer("branch3x3dbl_2", 96, 3), _layer("branch3x3dbl_3", 96, 3)],
        [_layer("branch_pool", pooled)],
    ]


def _block_b() -> list[list[Layer]]:
    return [
        [_layer("branch3x3", 384, 3, stride=2)],
        [_layer("branch3x3dbl_1", 64), _layer("branch3x3dbl_2", 96, 3), _layer("branch3x3dbl_3", 96, 3, stride=2)],
        [],
    ]


def _block_c(inner: int) -> list[list[Layer]]:
    return [
        [_layer("branch1x1", 192)],
        [_layer("branch7x7_1", inner), _layer("branch7x7_2", inner, 1, 7), _layer("branch7x7_3", 192, 7, 1)],
        [
            _layer("branch7x7dbl_1", inner), _layer("branch7x7dbl_2", inner, 7, 1),
            _layer("branch7x7dbl_3", inner, 1, 7), _layer("branch7x7dbl_4", inner, 7, 1),
            _layer("branch7x7dbl_5", 192, 1, 7),
        ],
        [_layer("branch_pool", 192)],
    ]  # fmt: skip


def _block_d() -> list[list[Layer]]:
    return [
        [_layer("branch3x3_1", 192), _layer("branch3x3_2", 320, 3, stride=2)],
        [
            _layer("branch7x7x3_1", 192), _layer("branch7x7x3_2", 192, 1, 7), _layer("branch7x7x3_3", 192, 7, 1),
            _layer("branch7x7x3_4", 192, 3, stride=2),
        ],
        [],
    ]  # fmt: skip


class _Convolution(nn.Module):
    """Convolution, batch normalisation, ReLU."""

    def __init__(self, before: int, layer: Layer, *, keep_size: bool) -> None:
        super().__init__()
        _, channels, kernel, stride = layer
        padding = (kernel[0] // 2, kernel[1] // 2) if keep_size else 0
        self.conv = nn.Conv2d(before, channels, kernel, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(channels, eps=0.001)

    def forward(self, images: Tensor) -> Tensor:
        """Feature maps `(N, C, h, w)`."""
        return F.relu(self.bn(self.conv(images)))


class _Branches(nn.Module):
    """Chains of convolutions side by side, their channels stacked; the last chain begins with a pooling."""

    def __init__(self, before: int, chains: list[list[Layer]], pooling: nn.Module) -> None:
        super().__init__()
        self._chains, self._pooling = [[layer[0] for layer in chain] for chain in chains], pooling
        for chain in chains:
            channels = before
            for layer in chain:
                self.add_module(layer[0], _Convolution(channels, layer, keep_size=layer[3] == 1))
                channels = layer[1]

    def forward(self, images: Tensor) -> Tensor:
        """Feature maps `(N, C, h, w)`."""
        found = []
        for number, chain in enumerate(self._chains):
            maps = self._pooling(images) if number == len(self._chains) - 1 else images
            for name in chain:
                maps = self.get_submodule(name)(maps)
            found.append(maps)
        return torch.cat(found, dim=1)


class _Split(nn.Module):
    """The block at 8x8, in which two of the chains end in a row and a column filter side by side."""

    def __init__(self, before: int, pooling: nn.Module) -> None:
        super().__init__()
        self._pooling = pooling
        shapes = [
            (before, _layer("branch1x1", 320)), (before, _layer("branch3x3_1", 384)),
            (384, _layer("branch3x3_2a", 384, 1, 3)), (384, _layer("branch3x3_2b", 384, 3, 1)),
            (before, _layer("branch3x3dbl_1", 448)), (448, _layer("branch3x3dbl_2", 384, 3)),
            (384, _layer("branch3x3dbl_3a", 384, 1, 3)), (384, _layer("branch3x3dbl_3b", 384, 3, 1)),
            (before, _layer("branch_pool", 192)),
        ]  # fmt: skip
        for channels, layer in shapes:
            self.add_module(layer[0], _Convolution(channels, layer, keep_size=True))

    def forward(self, images: Tensor) -> Tensor:
        """Feature maps `(N, 2048, h, w)`."""
        layer = self.get_submodule
        single = layer("branch3x3_1")(images)
        double = layer("branch3x3dbl_2")(layer("branch3x3dbl_1")(images))
        rows_and_columns = [layer(f"branch3x3_2{side}")(single) for side in "ab"]
        rows_and_columns += [layer(f"branch3x3dbl_3{side}")(double) for side in "ab"]
        pooled = layer("branch_pool")(self._pooling(images))
        return torch.cat([layer("branch1x1")(images), *rows_and_columns, pooled], dim=1)


class InceptionNetwork(nn.Module):
    """Images to the 2048 numbers before the classifier."""

    num_features = FEATURES  # torchmetrics asks for it

    def __init__(self) -> None:
        super().__init__()
        stem = [
            _layer("Conv2d_1a_3x3", 32, 3, stride=2),
            _layer("Conv2d_2a_3x3", 32, 3),
            _layer("Conv2d_2b_3x3", 64, 3),
            _layer("Conv2d_3b_1x1", 80),
            _layer("Conv2d_4a_3x3", 192, 3),
        ]
        channels = 3
        for layer in stem:
            self.add_module(layer[0], _Convolution(channels, layer, keep_size=layer[0] == "Conv2d_2b_3x3"))
            channels = layer[1]
        self._stem = [layer[0] for layer in stem]
        shrink = partial(nn.MaxPool2d, 3, stride=2)
        blocks: dict[str, nn.Module] = {
            "Mixed_5b": _Branches(192, _block_a(32), _mean()),
            "Mixed_5c": _Branches(256, _block_a(64), _mean()),
            "Mixed_5d": _Branches(288, _block_a(64), _mean()),
            "Mixed_6a": _Branches(288, _block_b(), shrink()),
            "Mixed_6b": _Branches(768, _block_c(128), _mean()),
            "Mixed_6c": _Branches(768, _block_c(160), _mean()),
            "Mixed_6d": _Branches(768, _block_c(160), _mean()),
            "Mixed_6e": _Branches(768, _block_c(192), _mean()),
            "Mixed_7a": _Branches(768, _block_d(), shrink()),
            "Mixed_7b": _Split(1280, _mean()),
            "Mixed_7c": _Split(2048, _largest()),
        }
        for name, block in blocks.items():
            self.add_module(name, block)
        self._blocks = list(blocks)

    def forward(self, images: Tensor) -> Tensor:
        """Features `(N, 2048)` of images uint8 `(N, 3, H, W)` of any size."""
        maps = (resized(images.float()) - 128) / 128
        for name in self._stem:
            maps = self.get_submodule(name)(maps)
            if name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3"):
                maps = F.max_pool2d(maps, 3, stride=2)
        for name in self._blocks:
            maps = self.get_submodule(name)(maps)
        return maps.mean(dim=(2, 3))


def resized(images: Tensor) -> Tensor:
    """Images `(N, 3, H, W)` at 299x299, bilinear as TensorFlow 1 has it: pixel i is sampled at i·(H/299)."""
    for axis in (2, 3):
        size = images.shape[axis]
        # In float32, as there: a sample may fall on the other side of a pixel's edge.
        places = torch.arange(_SIDE, dtype=torch.float32, device=images.device) * (size / _SIDE)
        first = places.long().clamp(max=size - 1)
        share = (places - first).view([-1 if axis == dimension else 1 for dimension in range(4)])
        near, far = images.index_select(axis, first), images.index_select(axis, (first + 1).clamp(max=size - 1))
        images = near + (far - near) * share
    return images


class Inception:
    """The network with given weights.

    Args:
        folder: with the weights, one safetensors file.
        device: of the network.

    Raises:
        ModelError: the folder does not hold them.
    """

    def __init__(self, folder: Path, *, device: str = "cpu") -> None:
        self.network, self.device = InceptionNetwork(), device
        load_weights(self.network, folder, SOURCE)
        self.network.to(device)
        self.weights = folder_digest(folder)
