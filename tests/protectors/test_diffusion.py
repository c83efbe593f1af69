from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file, save_file

from protectors.diffusion import DiffusionModel, load_model, model_digest
from protectors.model_files import ModelError
from protectors.randomness import streams
from protectors.schedule import NoiseSchedule
from tests.protectors.tiny import save_tiny_model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def model(source: Path) -> DiffusionModel:
    return load_model(str(source))


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(source, tmp_path / "copy"))


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2", "trained"])
def test_schedule_equals_diffusers(kind: str) -> None:
    settings = (
        {"trained_betas": [0.001 * (k + 1) for k in range(50)]}
        if kind == "trained"
        else {"beta_schedule": kind, "beta_start": 0.00085, "beta_end": 0.012}
    )
    scheduler = DDPMScheduler(**settings)
    ours = NoiseSchedule.from_config(dict(scheduler.config)).alphas_cumprod
    assert torch.allclose(ours, scheduler.alphas_cumprod, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "settings", [{"rescale_betas_zero_snr": True}, {"prediction_type": "sample"}, {"beta_schedule": "sigmoid"}]
)
def test_unsupported_schedule_is_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ModelError, match="not supported"):
        NoiseSchedule.from_config(settings)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_targets_match_closed_forms_and_give_back_x0(kind: str) -> None:
    abar = torch.linspace(0.99, 0.05, 1000)
    schedule = NoiseSchedule(abar, kind)  # type: ignore[arg-type]
    latents, noise, t = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0, 500, 999])
    a = abar[t].double().view(-1, 1, 1, 1)
    velocity = a.sqrt() * noise.double() - (1 - a).sqrt() * latents.double()
    target = schedule.target(latents, noise, t)
    assert torch.allclose(target.double(), noise.double() if kind == "epsilon" else velocity, atol=1e-5)
    noisy = schedule.add_noise(latents, noise, t)
    assert torch.allclose(noisy.double(), a.sqrt() * latents + (1 - a).sqrt() * noise, atol=1e-5)
    assert torch.allclose(schedule.predict_x0(noisy, target, t), latents, atol=1e-4)


def test_geometry(model: DiffusionModel) -> None:
    images = torch.rand(1, 3, 33, 47)
    assert (model.vae_factor, model.stride, model.base_size) == (2, 4, 64)
    mean, logvar = model.encode_moments(images)
    assert mean.shape == logvar.shape == (1, *model.latent_shape(images)) == (1, 4, 18, 24)
    assert model.decode(model.encode(images, streams([1], "test"))).shape == (1, 3, 36, 48)


def test_encoder_sees_minus_one_to_one_and_replicated_edges(model: DiffusionModel) -> None:
    images = torch.rand(1, 3, 6, 7)
    rows, columns = torch.arange(8).clamp(max=5), torch.arange(8).clamp(max=6)
    padded = images[:, :, rows][:, :, :, columns] * 2 - 1
    with torch.no_grad():
        assert torch.equal(model.encode_moments(images)[0], model.vae.encode(padded).latent_dist.mean)


def test_prompts_are_cached_and_batch_free(model: DiffusionModel) -> None:
    both = model.embed_prompts(["a photo", "a cat"])
    assert both.shape == (2, 16, 32)
    assert not both.requires_grad
    assert torch.equal(model.embed_prompts(["a cat"])[0], both[1])
    assert not torch.equal(both[0], both[1])


def test_half_precision_keeps_images_and_losses_in_float32(source: Path) -> None:
    model = load_model(str(source), dtype=torch.bfloat16)
    assert {part.dtype for part in (model.vae, model.unet, model.text_encoder)} == {torch.bfloat16}
    images = torch.rand(1, 3, 8, 8, requires_grad=True)
    latents = model.encode(images, streams([1], "test"))
    prediction = model.predict(latents, torch.tensor([5]), model.embed_prompts(["a"]))
    (gradient,) = torch.autograd.grad(prediction.sum(), images)
    assert latents.dtype == prediction.dtype == gradient.dtype == torch.float32


def test_unload_drops_the_weights(source: Path) -> None:
    model = load_model(str(source))
    model.unload()
    assert all(parameter.is_meta for parameter in model.unet.parameters())


def test_digest_follows_content_only(folder: Path, source: Path) -> None:
    digest = model_digest(str(source))
    (folder / "README.md").write_text("changed")
    (folder / "unet" / "preview.png").write_bytes(b"no part of the model")
    assert model_digest(str(folder)) == digest == load_model(str(folder)).digest
    for file in ("unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"):
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert model_digest(str(folder)) != digest
        (folder / file).write_bytes(content)
    assert model_digest(str(folder)) == digest


@pytest.mark.parametrize("part", ["vae", "unet", "text_encoder"])
def test_pickle_weights_are_refused(folder: Path, part: str) -> None:
    (weights,) = (folder / part).glob("*.safetensors")
    name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
    torch.save(load_file(weights), folder / part / name)
    weights.unlink()
    with pytest.raises(ModelError, match="pickle files are refused"):
        load_model(str(folder))


def test_missing_weights_are_not_filled_with_noise(folder: Path) -> None:
    weights = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lacks weights"):
        load_model(str(folder))


def test_truncated_weights_are_refused(folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="unet cannot be loaded"):
        load_model(str(folder))


def test_folder_errors_say_what_is_wrong(folder: Path, tmp_path: Path) -> None:
    for path, message in (("/no/such/folder", "no folder"), (str(tmp_path), "model_index.json")):
        with pytest.raises(ModelError, match=message):
            load_model(path)
    index_file = folder / "model_index.json"
    index = json.loads(index_file.read_text())
    for change, message in (
        ({"_class_name": "DDPMPipeline"}, "is a pixel-space model, and this needs a latent text-to-image one"),
        ({"unet": ["diffusers", "UNet2DModel"]}, "pixel-space"),
        ({"vae": ["diffusers", "VQModel"]}, "VQModel; supported: AutoencoderKL"),
        ({"text_encoder": [None, None]}, "has no text_encoder"),
    ):
        index_file.write_text(json.dumps({**index, **change}))
        with pytest.raises(ModelError, match=message):
            load_model(str(folder))
    index_file.write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        load_model(str(folder))


def test_hub_id_offline_gives_a_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="neither a folder nor a model in the local cache"):
        load_model("nobody/nothing")
