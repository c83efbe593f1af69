"""LDM-pure, IMPRESS, noisy upscaling and PDM-Pure beyond the common contract."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers import IFImg2ImgSuperResolutionPipeline, StableDiffusionUpscalePipeline
from torch import Tensor

from pipeline.verify.attack_models import AttackModels, ModelKind
from pipeline.verify.purifiers.impress import ImpressLite, structural_distance
from pipeline.verify.purifiers.latent import LDMPure, RoundTrip
from pipeline.verify.purifiers.upscale import NoisyUpscaling, PDMPure, Upscaling, upscale
from protectors.randomness import streams
from tests.pipeline.verify_purifiers.models import save_attack_models


@pytest.fixture(scope="module")
def models(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> AttackModels:
    return save_attack_models(tmp_path_factory.mktemp("models"))


def image(height: int = 32, width: int = 32) -> Tensor:
    coarse = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, (height, width), mode="bilinear").mul(255).round().to(torch.uint8)


def test_the_round_trip_is_the_decoded_mean(models: AttackModels) -> None:
    vae, pixels = models.get(ModelKind.LATENT).vae, image()
    with torch.no_grad():
        decoded = vae.decode(vae.encode(pixels.float() / 127.5 - 1).latent_dist.mean).sample
    expected = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round()
    assert (RoundTrip().purify(pixels, seeds=[0], models=models).float() - expected).abs().max() <= 1


@pytest.mark.parametrize(("strength", "steps"), [(0.0, 50), (1.1, 50), (0.1, 9)])
def test_a_strength_that_runs_no_step_is_refused(strength: float, steps: int) -> None:
    with pytest.raises(ValueError, match="LDM-pure"):
        LDMPure(strength=strength, steps=steps)


def test_ldm_pure_runs_its_share_of_the_schedule(models: AttackModels) -> None:
    times: list[int] = []
    hook = models.get(ModelKind.LATENT).unet.register_forward_pre_hook(
        lambda module, inputs: times.append(int(inputs[1]))
    )
    LDMPure(strength=0.2, steps=50).purify(image(), seeds=[0], models=models)
    hook.remove()
    assert len(times) == 10
    assert times == sorted(times, reverse=True)
    assert 170 < times[0] <= 200


def test_guidance_without_words_changes_nothing(models: AttackModels) -> None:
    """Why the registry has no guided variant of the empty prompt: it would cost twice as much for the same."""
    plain, guided, named = (
        LDMPure(strength=0.3, steps=10, guidance=guidance, prompt=prompt)._purify(
            image().float() / 255, streams([0], "same"), models
        )
        for guidance, prompt in ((1.0, ""), (7.5, ""), (7.5, "noise-free"))
    )
    assert torch.allclose(plain, guided, atol=1e-4)
    assert not torch.allclose(guided, named, atol=1e-4)


# --- IMPRESS


def inconsistency(models: AttackModels, pixels: Tensor) -> float:
    vae = models.get(ModelKind.LATENT).vae
    with torch.no_grad():
        given = pixels.float() / 127.5 - 1
        return float((vae.decode(vae.encode(given).latent_dist.mode()).sample - given).square().mean())


def test_impress_makes_an_image_consistent_and_the_leash_holds_it(models: AttackModels) -> None:
    pixels = image()
    free = ImpressLite(iterations=30, rate=0.03, leash=0.02, leash_weight=0.0)
    far = free.purify(pixels, seeds=[0], models=models)
    near = replace(free, leash_weight=100.0).purify(pixels, seeds=[0], models=models)
    assert inconsistency(models, far) < 0.7 * inconsistency(models, pixels)
    distances = [float(structural_distance(found / 255, pixels / 255)) for found in (far, near)]
    assert distances[1] < 0.05 < distances[0]


def test_impress_draws_only_when_it_starts_from_noise() -> None:
    assert not ImpressLite().randomised
    assert ImpressLite(noise=0.05).randomised


def test_the_leash_is_multiscale_where_that_is_defined() -> None:
    """Independent noise hides a smooth image at the finest scale and averages out at coarser ones."""
    smooth = (image(176, 176) / 255).expand(2, -1, -1, -1)
    noise = 0.1 * torch.randn(smooth.shape, generator=torch.Generator().manual_seed(0))
    noise[0] = 0
    noisy = (smooth + noise).clamp(0, 1)
    five, one = (structural_distance(noisy[..., :side], smooth[..., :side]) for side in (176, 175))
    assert five.shape == (2,)
    assert float(five[0]) == pytest.approx(0, abs=1e-5)
    assert float(five[1]) < 0.6 * float(one[1])


# --- Upscaling


def nearest(self: Any, prompt: list[str], image: Tensor, **options: Any) -> Any:
    return type("Output", (), {"images": image.repeat_interleave(4, 2).repeat_interleave(4, 3)})


def test_tiles_of_an_upscaler_join_without_a_seam(models: AttackModels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusers.StableDiffusionUpscalePipeline, "__call__", nearest)
    small = torch.rand(2, 3, 37, 85)
    large = upscale(models.get(ModelKind.UPSCALER), small, streams([0, 1], "test"), Upscaling(tile=16))
    assert torch.allclose(large, small.repeat_interleave(4, 2).repeat_interleave(4, 3), atol=1e-5)


@pytest.mark.parametrize("quarter_first", [False, True])
def test_noisy_upscaling_calls_the_upscaler_as_published(
    models: AttackModels, monkeypatch: pytest.MonkeyPatch, quarter_first: bool
) -> None:
    calls: list[tuple[Tensor, dict[str, Any]]] = []

    def spy(self: Any, prompt: list[str], image: Tensor, **options: Any) -> Any:
        calls.append((image, options))
        return nearest(self, prompt, image)

    monkeypatch.setattr(diffusers.StableDiffusionUpscalePipeline, "__call__", spy)
    grey = torch.full((1, 3, 64, 96), 128, dtype=torch.uint8)
    purified = NoisyUpscaling(quarter_first=quarter_first).purify(grey, seeds=[0], models=models)
    ((noisy, options),) = calls
    assert noisy.shape[-2:] == ((16, 24) if quarter_first else (64, 96))
    assert float(noisy.std()) == pytest.approx(0.1, rel=0.1)
    assert torch.allclose(noisy * 255, (noisy * 255).round(), atol=1e-3)
    called = {name: options[name] for name in ("noise_level", "num_inference_steps", "guidance_scale")}
    assert called == {"noise_level": 20, "num_inference_steps": 75, "guidance_scale": 9.0}
    assert purified.shape == grey.shape


def test_a_level_beyond_the_checkpoint_is_refused(models: AttackModels) -> None:
    with pytest.raises(ValueError, match="350"):
        NoisyUpscaling(upscaling=Upscaling(noise_level=351, steps=1)).purify(image(), seeds=[0], models=models)


def test_the_real_upscaler_is_told_the_noise_level(models: AttackModels) -> None:
    results = [
        NoisyUpscaling(upscaling=Upscaling(noise_level=level, steps=2))._purify(
            image().float() / 255, streams([0], "same"), models
        )
        for level in (20, 20, 320)
    ]
    assert torch.equal(results[0], results[1])
    assert not torch.allclose(results[0], results[2], atol=1e-3)
    assert type(models.get(ModelKind.UPSCALER)) is StableDiffusionUpscalePipeline


def test_pdm_pure_denoises_the_lowest_timesteps_of_the_cascade(models: AttackModels) -> None:
    cascade = models.get(ModelKind.CASCADE)
    times: list[int] = []
    sizes: set[tuple[int, ...]] = set()

    def look(module: Any, inputs: tuple[Any, ...]) -> None:
        times.append(int(inputs[1]))
        sizes.add(tuple(inputs[0].shape))

    hook = cascade.unet.register_forward_pre_hook(look)
    PDMPure(upscaling=Upscaling(steps=1)).purify(image(64, 96), seeds=[0], models=models)
    hook.remove()
    assert times == [99, 88, 77, 66, 55, 44, 33, 22, 11, 0]
    assert sizes == {(2, 6, 32, 48)}  # guided, and at the cascade's side


def test_the_cascade_attends_to_its_text(models: AttackModels) -> None:
    """As diffusers loads it: processors of plain attention would leave the text's keys and values out."""
    PDMPure(steps=1, upscaling=Upscaling(steps=1)).purify(image(), seeds=[0], models=models)
    folder = models.folders[ModelKind.CASCADE]
    fresh = IFImg2ImgSuperResolutionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    fresh.unet.eval()
    noisy, text = torch.rand(1, 6, 32, 32), torch.rand(1, 5, 16)
    with torch.no_grad():
        used, expected = (
            network(noisy, 10, encoder_hidden_states=text, class_labels=torch.tensor([250])).sample
            for network in (models.get(ModelKind.CASCADE).unet, fresh.unet)
        )
    assert torch.allclose(used, expected, atol=1e-5)
