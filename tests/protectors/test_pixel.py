"""The wrapper of pixel-space models, and which models are loaded for which method."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from protectors.antipure import AntiPure
from protectors.diffusion import DiffusionModel
from protectors.loading import load_for, model_source
from protectors.mist import Mist
from protectors.model_files import ModelError, model_digest
from protectors.pixel import PixelModel, load_pixel_model
from protectors.reference import NANO_DDPM, NANO_SD, reference_path
from tests.protectors.tiny import save_tiny_model, save_tiny_pixel_model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pixel_model(tmp_path_factory.mktemp("pixel") / "tiny")


@pytest.fixture(scope="module")
def model(source: Path) -> PixelModel:
    return load_pixel_model(str(source))


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(source, tmp_path / "copy"))


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_the_network_sees_minus_one_to_one(model: PixelModel) -> None:
    levels = torch.tensor([0.0, 255.0]) / 255
    assert model.encode(levels).tolist() == [-1, 1]


def test_abar_of_the_embedded_model() -> None:
    """The table of the specification, for timesteps that count from 1."""
    model = load_pixel_model(str(reference_path(NANO_DDPM)))
    table = {1: 0.99990, 10: 0.99811, 50: 0.97102, 100: 0.89702}
    assert {t: round(float(model.alphas_cumprod[t - 1]), 5) for t in table} == table
    assert (model.base_size, model.prediction_type) == (64, "epsilon")


def test_the_clean_tile_comes_back_when_the_noise_is_known(model: PixelModel) -> None:
    tiles, noise, t = torch.rand(3, 3, 32, 32) * 2 - 1, torch.randn(3, 3, 32, 32), torch.tensor([0, 9, 500])
    assert torch.allclose(model.predict_x0(model.add_noise(tiles, noise, t), noise, t), tiles, atol=1e-5)


def test_a_learned_variance_is_left_out(tmp_path: Path) -> None:
    model = load_pixel_model(str(save_tiny_pixel_model(tmp_path / "six", channels=6)))
    noisy, t = torch.randn(2, 3, 32, 32), torch.tensor([3, 7])
    with torch.no_grad():
        both = model.unet(noisy, t).sample
        assert both.shape[1] == 6
        assert torch.equal(model.predict_noise(noisy, t), both[:, :3])


def test_v_predictions_become_noise(tmp_path: Path) -> None:
    model = load_pixel_model(str(save_tiny_pixel_model(tmp_path / "v", prediction_type="v_prediction")))
    noisy, t = torch.randn(2, 3, 32, 32), torch.tensor([10, 700])
    abar = model.alphas_cumprod[t].double().view(-1, 1, 1, 1)
    with torch.no_grad():
        velocity = model.unet(noisy, t).sample.double()
        expected = abar.sqrt() * velocity + (1 - abar).sqrt() * noisy.double()
        assert torch.allclose(model.predict_noise(noisy, t).double(), expected, atol=1e-5)


def test_half_precision_keeps_tiles_in_float32(source: Path) -> None:
    model = load_pixel_model(str(source), dtype=torch.bfloat16)
    tiles = torch.rand(1, 3, 32, 32, requires_grad=True)
    predicted = model.predict_noise(tiles, torch.tensor([5]))
    (gradient,) = torch.autograd.grad(predicted.sum(), tiles)
    assert model.dtype == torch.bfloat16
    assert predicted.dtype == gradient.dtype == torch.float32
    assert gradient.any()


def test_the_digest_follows_the_files(folder: Path, source: Path) -> None:
    digest = model_digest(str(source))
    (folder / "README.md").write_text("changed")
    assert model_digest(str(folder)) == digest == load_pixel_model(str(folder)).digest
    change(folder / "scheduler" / "scheduler_config.json", beta_end=0.03)
    assert model_digest(str(folder)) != digest


def test_pickled_and_missing_weights_are_refused(folder: Path) -> None:
    (weights,) = (folder / "unet").glob("*.safetensors")
    tensors = load_file(weights)
    torch.save(tensors, folder / "unet" / "diffusion_pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ModelError, match="pickle files are refused"):
        load_pixel_model(str(folder))
    tensors.pop(min(tensors))
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lacks weights"):
        load_pixel_model(str(folder))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"in_channels": 4}, "takes 4 channels and gives 3"),
        ({"out_channels": 4}, "takes 3 channels and gives 4"),
        ({"num_class_embeds": 10}, "class label"),
        ({"sample_size": [32, 64]}, "square images"),
        ({"sample_size": None}, "square images"),
    ],
)
def test_other_networks_are_refused(values: dict[str, Any], message: str, model: PixelModel) -> None:
    from diffusers import UNet2DModel

    unet = UNet2DModel.from_config({**model.unet.config, **values})
    with pytest.raises(ModelError, match=message):
        PixelModel(unet, model.schedule, digest="")


def test_each_method_gets_its_kind_of_model(tmp_path: Path) -> None:
    folders = {AntiPure: save_tiny_pixel_model(tmp_path / "pixel"), Mist: save_tiny_model(tmp_path / "latent")}
    for method, other, kind in ((AntiPure, Mist, PixelModel), (Mist, AntiPure, DiffusionModel)):
        model = load_for(method, str(folders[method]), device="cpu", dtype=torch.bfloat16)
        assert type(model) is kind
        assert model.dtype == torch.bfloat16
        with pytest.raises(ModelError, match="and this needs a"):
            load_for(method, str(folders[other]), device="cpu", dtype=torch.float32)
        with pytest.raises(ModelError, match="and this needs a"):
            model_source(method).training_scale(str(folders[other]))


def test_training_scale_is_that_of_the_attacker() -> None:
    """Both embedded models see images of one size: the purifier in tiles of half of it."""
    scales = {}
    for method in (AntiPure, Mist):
        source = model_source(method)
        scales[source.kind, source.embedded] = source.training_scale(str(reference_path(source.embedded)))
    assert scales == {("pixel", NANO_DDPM): 128, ("latent", NANO_SD): 128}


def test_an_unknown_kind_of_model_is_told() -> None:
    class Strange(AntiPure):
        name = "strange"
        model_type = dict

    with pytest.raises(ModelError, match=r"nothing loads a dict, which strange takes; known: DiffusionModel"):
        model_source(Strange)
