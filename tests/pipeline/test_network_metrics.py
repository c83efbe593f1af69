"""LPIPS and FID on networks of random weights: beside other computations, and refused where weights are not right."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from scipy.linalg import sqrtm
from skimage import data
from torch import Tensor, nn

from pipeline.verify.digest import folder_digest
from pipeline.verify.metrics.base import Against
from pipeline.verify.metrics.frechet import FrechetDistance, FrechetSets, fid_facts
from pipeline.verify.metrics.inception import Inception, InceptionNetwork, resized
from pipeline.verify.metrics.perceptual import HEADS, AlexNetTrunk, Lpips
from protectors.model_files import ModelError


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As torchvision saves it, classifier included."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("alexnet")
    save_file(AlexNetTrunk().state_dict() | {"classifier.6.bias": torch.zeros(3)}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def inception_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("inception")
    weights = {name: weight for name, weight in InceptionNetwork().state_dict().items() if "num_batches" not in name}
    save_file(weights | {"fc.bias": torch.zeros(1008)}, folder / "model.safetensors")
    return folder


def noise(count: int, side: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), generator=generator).to(torch.uint8)


# LPIPS.


def by_hand(weights: dict[str, Tensor], left: Tensor, right: Tensor) -> float:
    """The paper's equation 1 by convolutions one after the other; images `(3, H, W)` in 0..1."""
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    sides = [((side - mean[:, None, None]) / deviation[:, None, None])[None] for side in (left, right)]
    heads, total = load_file(HEADS), 0.0
    strides, paddings = {0: 4}, {0: 2, 3: 2, 6: 1, 8: 1, 10: 1}
    for number, place in enumerate((0, 3, 6, 8, 10)):
        if place in (3, 6):
            sides = [F.max_pool2d(side, 3, 2) for side in sides]
        weight, bias = weights[f"features.{place}.weight"], weights[f"features.{place}.bias"]
        sides = [
            F.conv2d(side, weight, bias, stride=strides.get(place, 1), padding=paddings[place]).relu() for side in sides
        ]
        one, other = (F.normalize(side, dim=1, eps=1e-12) for side in sides)
        total += float(F.conv2d((one - other) ** 2, heads[f"lin{number}.weight"].view(1, -1, 1, 1)).mean())
    return total


def test_lpips_is_the_papers_equation(alexnet: Path) -> None:
    originals, images = noise(2, 80, 1), noise(2, 80, 2)
    weights = load_file(alexnet / "model.safetensors")
    expected = [by_hand(weights, a / 255, b / 255) for a, b in zip(images, originals, strict=True)]
    metric = Lpips(alexnet)
    scores = metric.score(images, Against(originals=originals))["lpips"]
    # The published code rounds ImageNet's mean and deviation to three digits.
    assert scores == pytest.approx(expected, rel=5e-3)
    assert metric.score(originals, Against(originals=originals))["lpips"] == [0, 0]
    single = metric.score(images[1:], Against(originals=originals[1:]))["lpips"]
    assert single == pytest.approx(scores[1:], rel=1e-4)
    assert metric.score(images[..., :30], Against(originals=originals[..., :30])) == {}
    assert len(metric.score(images[..., :31], Against(originals=originals[..., :31]))["lpips"]) == 2


def test_lpips_grows_with_the_change_and_names_its_weights(alexnet: Path) -> None:
    photo = torch.from_numpy(data.astronaut()[:128, :128].copy()).permute(2, 0, 1)[None]
    change = torch.randn(photo.shape, generator=torch.Generator().manual_seed(0))
    metric = Lpips(alexnet)
    scores = [
        metric.score((photo + levels * change).clamp(0, 255).to(torch.uint8), Against(originals=photo))["lpips"][0]
        for levels in (2, 8, 32)
    ]
    assert 0 < scores[0] < scores[1] < scores[2]
    (facts,) = metric.facts
    assert facts.weights == folder_digest(alexnet)
    assert facts.licence == "of the given weights"


def test_the_bundled_heads_are_the_published_ones() -> None:
    """1152 numbers, none negative: the paper's training clamps them."""
    assert (
        hashlib.sha256(HEADS.read_bytes()).hexdigest()
        == "1b78021010e322923936f2cfa70048dc2643be1946dc67ab4e639905a87dc578"
    )
    heads = load_file(HEADS)
    assert {name: len(weight) for name, weight in heads.items()} == {
        "lin0.weight": 64, "lin1.weight": 192, "lin2.weight": 384, "lin3.weight": 256, "lin4.weight": 256,
    }  # fmt: skip
    assert min(float(weight.min()) for weight in heads.values()) >= 0
    assert "Zhang" in HEADS.with_name("LICENSE").read_text()


def test_other_weights_are_refused(alexnet: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds 0 safetensors files"):
        Lpips(tmp_path)
    (tmp_path / "alexnet.safetensors").write_bytes(b"no such file")
    with pytest.raises(ModelError, match="cannot be read"):
        Lpips(tmp_path)
    weights = load_file(alexnet / "model.safetensors")
    save_file(weights | {"features.3.weight": torch.zeros(2, 2)}, tmp_path / "alexnet.safetensors")
    with pytest.raises(ModelError, match=r"features\.3\.weight"):
        Lpips(tmp_path)
    torch.save(weights, tmp_path / "alexnet.pth")  # pickles are never read
    (tmp_path / "alexnet.safetensors").unlink()
    with pytest.raises(ModelError, match="holds 0"):
        Lpips(tmp_path)


# FID.


def test_tensorflows_resize() -> None:
    """Pixel i is the input at i·(size/299): a ramp becomes a ramp from its first value, flat at the end."""
    ramp = torch.arange(100.0).expand(1, 3, 40, 100)
    found = resized(ramp)
    assert found.shape == (1, 3, 299, 299)
    expected = (torch.arange(299) * 100 / 299).clamp(max=99)
    torch.testing.assert_close(found[0, 1, 7], expected, atol=1e-3, rtol=0)
    images = noise(1, 299, 3).float()
    torch.testing.assert_close(resized(images), images)


def test_inception_has_the_published_shape(inception_folder: Path) -> None:
    inception = Inception(inception_folder)
    assert sum(weight.numel() for weight in inception.network.parameters()) == 21_785_568
    names = set(inception.network.state_dict())
    assert {"Mixed_5b.branch5x5_2.conv.weight", "Mixed_7c.branch3x3dbl_3b.bn.running_var"} <= names
    with torch.no_grad():
        features = inception.network(noise(1, 90, 4))
    assert features.shape == (1, 2048)
    assert len(fid_facts(inception).weights) == 64
    sets = FrechetSets(inception.network)
    for side in (0, 1):
        sets.add(side, noise(1, 64, side))
    with pytest.raises(ValueError, match="at least 2048"):
        sets.distance()
    with pytest.raises(ModelError, match="weights-inception-2015-12-05"):
        Inception(HEADS.parent)


def test_what_differs_from_torchvisions_inception(inception_folder: Path) -> None:
    """Averages leave the border out, the last block alone takes a maximum, and 0..255 becomes -1..127/128."""
    network = Inception(inception_folder).network
    seen: dict[str, list[Tensor]] = {}

    def watch(name: str) -> None:
        def keep(_: nn.Module, given: tuple[Tensor]) -> None:
            seen.setdefault(name, []).append(given[0])

        network.get_submodule(name).register_forward_pre_hook(keep)

    blocks = ("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7b")
    for block in (*blocks, "Mixed_7c"):
        watch(block)
        watch(f"{block}.branch_pool")
    watch("Conv2d_1a_3x3")
    images = torch.zeros(1, 3, 299, 299, dtype=torch.uint8)
    images[:, 1], images[:, 2] = 255, noise(1, 299, 7)[0, 0]
    with torch.no_grad():
        network(images)
    (first,) = seen["Conv2d_1a_3x3"]
    assert (first[:, 0] == -1).all()
    assert (first[:, 1] == 127 / 128).all()
    for block in blocks:
        maps, pooled = seen[block][0], seen[f"{block}.branch_pool"][0]
        torch.testing.assert_close(pooled[..., 0, 0], maps[..., :2, :2].mean(dim=(2, 3)))
        torch.testing.assert_close(pooled[..., 1, 1], maps[..., :3, :3].mean(dim=(2, 3)))
    maps, pooled = seen["Mixed_7c"][0], seen["Mixed_7c.branch_pool"][0]
    torch.testing.assert_close(pooled[..., 0, 0], maps[..., :2, :2].amax(dim=(2, 3)))
    torch.testing.assert_close(pooled[..., 1, 1], maps[..., :3, :3].amax(dim=(2, 3)))


class Corners(nn.Module):
    """Six pixels as features."""

    num_features = 6

    def forward(self, images: Tensor) -> Tensor:
        return images[:, :, 0, :2].reshape(len(images), 6).float()


def frechet_distance(left: Tensor, right: Tensor, *, fewest: int) -> FrechetDistance:
    sets = FrechetSets(Corners(), fewest=fewest)
    sets.add(1, right)
    for images in left.split(7):
        sets.add(0, images)
    return sets.distance()


def test_the_distance_is_scipys_and_tells_missing_rank() -> None:
    left, right = noise(40, 4, 5), noise(30, 4, 6) // 2
    found = frechet_distance(left, right, fewest=6)
    sides = [Corners()(side).double().numpy() for side in (left, right)]
    means, covariances = [side.mean(axis=0) for side in sides], [np.cov(side.T) for side in sides]
    root = sqrtm(covariances[0] @ covariances[1]).real
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert found.value == pytest.approx(expected, rel=1e-5)
    assert (found.images, found.ranks, found.full_rank) == ((40, 30), (6, 6), True)
    few = frechet_distance(left[:4], right, fewest=2)
    assert (few.ranks, few.full_rank) == ((3, 6), False)
    copies = frechet_distance(left[:3].repeat(20, 1, 1, 1), right, fewest=6)
    assert copies.ranks == (2, 6)
    assert frechet_distance(left, left, fewest=6).value == pytest.approx(0, abs=1e-3)
    with pytest.raises(ValueError, match="4 and 30 images"):
        frechet_distance(left[:4], right, fewest=6)
