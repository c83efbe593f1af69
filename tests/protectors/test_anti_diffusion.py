"""Anti-Diffusion: its losses, the order and the limits of its stages, and what every switch changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from protectors import anti_diffusion
from protectors.anti_diffusion import AntiDiffusion, AntiDiffusionConfig, semantic_disturbance
from protectors.attention import cross_attention_layers
from protectors.diffusion import DiffusionModel, load_model
from protectors.model_files import ModelError
from protectors.objectives import Draws
from protectors.pgd import pgd
from protectors.prompt_tuning import tune_prompts
from protectors.randomness import normal, streams
from protectors.surrogate import LoraSurrogates, Surrogates
from tests.protectors.tiny import save_tiny_model

# The tiny model has 16 tokens of mean attention 1/16: at this scale some of it is cut and some is not.
SCALE = 15.0
SMALL = AntiDiffusionConfig(
    epochs=2, pt_steps=2, pt_rate=1e-2, pgd_steps=2, step_levels=3.0, unet_steps=2, unet_rate=1e-2, sdl_scale=SCALE,
    surrogate="lora", eval_draws=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: save_tiny_model(root / kind, prediction_type=kind) for kind in ("epsilon", "v_prediction")}


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> dict[str, DiffusionModel]:
    return {kind: load_model(str(folder)) for kind, folder in folders.items()}


def pictures(count: int, height: int = 16, width: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(count, 3, height, width, generator=generator) * 255).round() / 255


def pixels(model: DiffusionModel, count: int = 1, *, groups: list[str] | None = None, **changes: Any) -> Tensor:
    protector = AntiDiffusion(SMALL.replace(**changes), model)
    return protector.protect(pictures(count), seeds=list(range(count)), groups=groups).images


def fixed_draws(model: DiffusionModel, images: Tensor) -> Draws:
    generators = streams(range(len(images)), "test")
    noise, posterior = (normal(generators, model.latent_shape(images)) for _ in range(2))
    return Draws(t=torch.tensor([150, 700])[: len(images)], noise=noise, posterior=posterior)


def gain(protector: AntiDiffusion, images: Tensor, prompts: Tensor, draws: Draws) -> Tensor:
    return protector._gain(protector.model.encode_moments(images), prompts, draws)


def attention_in_float64(unet: Any, run: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """The prediction, and cross-attention from the outputs of its query and key projections alone."""
    layers, seen = cross_attention_layers(unet)[1], []
    projections = [projection for layer in layers for projection in (layer.to_q, layer.to_k)]
    handles = [each.register_forward_hook(lambda *call: seen.append(call[2])) for each in projections]
    prediction = run()
    for handle in handles:
        handle.remove()
    maps = []
    for layer, query, key in zip(layers, seen[::2], seen[1::2], strict=True):
        query, key = (each.unflatten(-1, (layer.heads, -1)) for each in (query, key))
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
        maps.append((scores.exp() / scores.exp().sum(-1, keepdim=True)).mean(1))
    return prediction, torch.stack(maps).mean(0)


@pytest.mark.parametrize("variant", ["clamp", "square"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_objective_agrees_with_a_computation_in_float64(
    kind: str, variant: str, models: dict[str, DiffusionModel], folders: dict[str, Path]
) -> None:
    model, images = models[kind], pictures(2)
    prompts, draws = model.embed_prompts(["", "a photo"]), fixed_draws(model, images)
    protector = AntiDiffusion(SMALL.replace(sdl_variant=variant, lambda_sdl=0.5), model)
    found = gain(protector, images, prompts, draws)

    exact = load_model(str(folders[kind]), dtype=torch.float64)
    posterior = exact.vae.encode(images.double() * 2 - 1).latent_dist
    z = posterior.mean + (posterior.logvar / 2).exp() * draws.posterior.double()
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = (1 - beta).cumprod(0)[draws.t].view(-1, 1, 1, 1)
    noise = draws.noise.double()
    noisy = abar.sqrt() * z + (1 - abar).sqrt() * noise
    target = noise if kind == "epsilon" else abar.sqrt() * noise - (1 - abar).sqrt() * z

    def run() -> Tensor:
        output: Tensor = exact.unet(noisy, draws.t, encoder_hidden_states=prompts.double()).sample
        return output

    prediction, attention = attention_in_float64(exact.unet, run)
    loud = (SCALE * attention).clamp(0, 1) if variant == "clamp" else 16 * attention
    expected = ((prediction - target) ** 2).mean((1, 2, 3)) - 0.5 * (loud**2).mean((1, 2))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)


def test_a_small_step_along_the_gradient_ascends(models: dict[str, DiffusionModel]) -> None:
    model, images = models["v_prediction"], pictures(2) * 0.8 + 0.1
    protector, draws, prompts = AntiDiffusion(SMALL, model), fixed_draws(model, images), model.embed_prompts(["", ""])
    start = images.clone().requires_grad_()
    before = gain(protector, start, prompts, draws)
    (gradient,) = torch.autograd.grad(before.sum(), start)
    assert (gain(protector, images + 0.05 / 255 * gradient.sign(), prompts, draws) > before).all()


class Watch:
    """Notes the stages in their order, and which weights changed or had gradients around each."""

    def __init__(self, model: DiffusionModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model = model
        self.stages: list[str] = []
        self.trained: list[bool] = []
        monkeypatch.setattr(anti_diffusion, "tune_prompts", self.around("prompt", tune_prompts))
        monkeypatch.setattr(anti_diffusion, "pgd", self.around("image", pgd))
        fit = self.around("weights", Surrogates.fit)
        monkeypatch.setattr(Surrogates, "fit", lambda *given, **options: fit(*given, **options))

    def around(self, stage: str, own: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*given: Any, **options: Any) -> Any:
            self.assert_frozen()
            before = self.weights(self.model.unet)
            others = [self.weights(network) for network in (self.model.vae, self.model.text_encoder)]
            result = own(*given, **options)
            self.assert_frozen()
            self.stages.append(stage)
            self.trained.append(not torch.equal(self.weights(self.model.unet), before))
            for network, old in zip((self.model.vae, self.model.text_encoder), others, strict=True):
                assert torch.equal(self.weights(network), old)
            return result

        return watched

    def weights(self, network: Any) -> Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])

    def assert_frozen(self) -> None:
        for network in (self.model.unet, self.model.vae, self.model.text_encoder):
            assert all(each.grad is None and not each.requires_grad for each in network.parameters())


@pytest.mark.parametrize(
    ("order", "stages"),
    [
        ("paper", ["prompt", "image", "weights", "prompt", "image", "weights", "prompt", "image"]),
        ("code", ["prompt", "image", "weights", "image", "prompt", "weights", "image"]),
    ],
)
def test_stages_come_in_order_and_change_only_what_is_theirs(
    order: str, stages: list[str], models: dict[str, DiffusionModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(models["epsilon"], monkeypatch)
    pixels(models["epsilon"], order=order, epochs=3, surrogate="full", unet_rate=1e-3)
    assert watch.stages == stages
    assert watch.trained == [stage == "weights" for stage in stages]


def test_every_stage_improves_what_it_is_for(models: dict[str, DiffusionModel]) -> None:
    """With the draws held fixed: prompts and weights lower the loss."""
    model, images = models["v_prediction"], pictures(2)
    start, draws = model.embed_prompts(["", ""]), fixed_draws(model, images)
    latents = model.latents(model.encode_moments(images), draws.posterior)

    def loss(prompts: Tensor, step: int = 0) -> Tensor:
        return anti_diffusion.latent_denoising_loss(model, latents, prompts, draws)

    kept = start.clone()
    tuned = tune_prompts(loss, start, steps=10, rate=1e-2)
    assert (loss(tuned) < loss(start)).all()
    assert torch.equal(start, kept)
    assert not tuned.requires_grad
    with LoraSurrogates(model, [1, 2]) as surrogates, surrogates.owned([0, 1]):
        surrogates.fit(lambda step: loss(tuned), steps=10, rate=1e-2)
        trained = loss(tuned)
    assert (trained < loss(tuned)).all()


def test_prompts_are_tuned_row_by_row() -> None:
    start = torch.randn(3, 4, 5)
    goal = torch.randn(3, 4, 5)

    def tuned(rows: slice) -> Tensor:
        def loss(prompts: Tensor, step: int) -> Tensor:
            return (prompts - goal[rows]).square().flatten(1).mean(1)

        return tune_prompts(loss, start[rows], steps=5, rate=0.1)

    assert torch.equal(tuned(slice(0, 3))[1:2], tuned(slice(1, 2)))
    assert torch.equal(tune_prompts(lambda prompts, step: prompts.sum((1, 2)), start, steps=0, rate=0.1), start)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_images_do_not_feel_their_neighbours(kind: str, models: dict[str, DiffusionModel]) -> None:
    protector = AntiDiffusion(SMALL.replace(surrogate=kind), models["v_prediction"])
    images = pictures(2)
    together = protector.protect(images, seeds=[4, 5]).images
    backwards = protector.protect(images.flip(0), seeds=[5, 4]).images
    for place, seed in enumerate([4, 5]):
        alone = protector.protect(images[place : place + 1], seeds=[seed]).images[0]
        for other in (together[place], backwards[1 - place]):
            assert (alone != other).float().mean() < 0.01
    assert (together[0] - images[0] != together[1] - images[1]).float().mean() > 0.1


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_subjects_images_share_a_surrogate_if_told(kind: str, models: dict[str, DiffusionModel]) -> None:
    model = models["v_prediction"]
    options = {"surrogate": kind, "share": "group", "unet_rate": 0.1, "unet_steps": 5}
    shared = pixels(model, 3, groups=["cat", "dog", "cat"], **options)
    apart = pixels(model, 3, groups=["cat", "dog", "cat"], **{**options, "share": "image"})
    changed = (shared != apart).flatten(1).float().mean(1)
    assert (changed[[0, 2]] > 0.05).all()
    if kind == "full":  # A low-rank delta begins with its group's own draws, but for one image they are the same.
        assert changed[1] == 0
    protector = AntiDiffusion(SMALL.replace(**options), model)
    cats = protector.protect(pictures(3)[[2, 0]], seeds=[2, 0], groups=["cat", "cat"]).images
    assert (cats != shared[[2, 0]]).float().mean() < 0.01


@pytest.fixture(scope="module")
def unswitched(models: dict[str, DiffusionModel]) -> Tensor:
    # With a weight that lets attention count.
    return pixels(models["v_prediction"], lambda_sdl=20.0)


@pytest.mark.parametrize(
    "change",
    [
        {"order": "code"},
        {"heads": "second_half"},
        {"pt_target": "eps"},
        {"pt_resample": True},
        {"pt_steps": 0},
        {"pt_rate": 0.1},
        {"unet_steps": 0},
        {"unet_rate": 0.1},
        {"grad_clip": 1e-8},
        {"surrogate": "full"},
        {"lambda_sdl": 0},
        {"sdl_variant": "square"},
        {"sdl_scale": 10.0},
        {"n_eot": 2},
        {"t_range": [0, 400]},
        {"latent_mode": "mode"},
    ],
    ids=str,
)
def test_every_switch_changes_the_pixels(
    change: dict[str, Any], models: dict[str, DiffusionModel], unswitched: Tensor
) -> None:
    assert not torch.equal(pixels(models["v_prediction"], **{"lambda_sdl": 20.0, **change}), unswitched)


def test_what_prompts_aim_at_differs_for_v_prediction_only(models: dict[str, DiffusionModel]) -> None:
    model = models["epsilon"]
    assert torch.equal(pixels(model, lambda_sdl=20.0), pixels(model, lambda_sdl=20.0, pt_target="eps"))


def test_layers_are_chosen_by_factor_or_by_their_number_of_queries(models: dict[str, DiffusionModel]) -> None:
    model = models["epsilon"]
    assert torch.equal(pixels(model, attn_factor=1), pixels(model, attn_abs=8))  # latents of 8 x 8
    for size in (16, 4, 7):
        with pytest.raises(ModelError, match=r"8 x 8; choose attn_factor from \[1\]"):
            pixels(model, attn_abs=size)


def test_three_stages_encode_an_image_as_often_as_it_changes(
    models: dict[str, DiffusionModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls = models["epsilon"], []
    own = model.encode_moments
    monkeypatch.setattr(model, "encode_moments", lambda images: calls.append(images.requires_grad) or own(images))
    pixels(model, epochs=3, pgd_steps=2)
    assert calls.count(True) == 3 * 2
    assert calls.count(False) == 1 + 3 + 2  # originals and what each epoch made of them; two for the facts


def stop(*_: Any) -> Tensor:
    raise RuntimeError("stopped")


def test_the_model_comes_back_after_an_exception(
    models: dict[str, DiffusionModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models["epsilon"]
    processors, weights = model.unet.attn_processors, [each.clone() for each in model.unet.parameters()]
    stages: list[int] = []

    def fail_late(attention: Tensor, scale: float | None) -> Tensor:
        stages.append(1)
        return semantic_disturbance(attention, scale) if len(stages) < 5 else stop()

    monkeypatch.setattr(anti_diffusion, "semantic_disturbance", fail_late)
    with pytest.raises(RuntimeError, match="stopped"):
        pixels(model, surrogate="full")
    assert all(each is processors[name] for name, each in model.unet.attn_processors.items())
    assert all(torch.equal(new, old) for new, old in zip(model.unet.parameters(), weights, strict=True))
    assert not any(each.requires_grad for each in model.unet.parameters())


def test_the_surrogate_is_in_place_while_the_image_moves(
    models: dict[str, DiffusionModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second noise stage climbs against weights that were trained, and full weights are put back at the end."""
    model, seen = models["epsilon"], []

    def spy(*given: Any, **options: Any) -> Tensor:
        seen.append(torch.equal(next(model.unet.parameters()), first))
        return pgd(*given, **options)

    first = next(model.unet.parameters()).clone()
    monkeypatch.setattr(anti_diffusion, "pgd", spy)
    pixels(model, surrogate="full", unet_rate=1e-3)
    assert seen == [True, False]
    assert torch.equal(next(model.unet.parameters()), first)


def test_presets_keep_the_published_numbers(models: dict[str, DiffusionModel]) -> None:
    paper = AntiDiffusion.presets["paper"]
    assert paper == AntiDiffusionConfig(eps_levels=7.0, attn_factor=4)
    assert (paper.epochs, paper.pt_steps, paper.pgd_steps, paper.unet_steps) == (6, 30, 10, 20)
    assert paper.step_levels == pytest.approx(2e-3 * 127.5)
    assert (paper.pt_rate, paper.unet_rate, paper.grad_clip) == (1e-3, 5e-7, None)
    assert (paper.lambda_sdl, paper.sdl_variant, paper.sdl_scale, paper.surrogate) == (1, "clamp", 100, "full")
    assert AntiDiffusion(paper.replace(attn_factor=1), models["epsilon"]).steps == 340


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pgd_steps": 0}, "pgd_steps=0"),
        ({"lambda_sdl": -1.0}, "lambda_sdl"),
        ({"grad_clip": 0.0}, "grad_clip"),
        ({"attn_factor": 4, "attn_abs": 16}, "not by both"),
        ({"t_range": [5, 4]}, "t_range"),
        ({"t_range": [1]}, "t_range"),
        ({"heads": "first_half"}, "heads"),
    ],
)
def test_impossible_values_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SMALL.replace(**change)


@pytest.mark.parametrize(
    ("change", "message"), [({"t_range": [0, 1000]}, "1000 timesteps"), ({"attn_factor": 2}, r"from \[1\]")]
)
def test_what_the_model_lacks_is_told_before_any_image(
    change: dict[str, Any], message: str, models: dict[str, DiffusionModel]
) -> None:
    with pytest.raises(ModelError, match=message):
        AntiDiffusion(SMALL.replace(**change), models["epsilon"])
    # Without the disturbance no attention is looked for.
    AntiDiffusion(SMALL.replace(attn_factor=2, lambda_sdl=0.0), models["epsilon"])


def test_a_full_surrogate_needs_float32(folders: dict[str, Path]) -> None:
    model = load_model(str(folders["epsilon"]), dtype=torch.bfloat16)
    with pytest.raises(ModelError, match="float32"):
        AntiDiffusion(SMALL.replace(surrogate="full"), model)
    assert (pixels(model) != pictures(1)).any()


def test_an_image_that_fails_leaves_its_group_and_the_others_alone(
    models: dict[str, DiffusionModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, options = models["v_prediction"], {"share": "group", "unet_rate": 1e-2}
    protector = AntiDiffusion(SMALL.replace(**options), model)
    images, seeds, groups = pictures(3), [1, 2, 3], ["cat", "dog", "cat"]
    whole = protector.protect(images, seeds=seeds, groups=groups)

    def broken(loss: Callable[..., Tensor], *given: Any, **options: Any) -> Tensor:
        factor = torch.tensor([torch.nan, 1.0, 1.0])
        return pgd(lambda images, step: loss(images, step) * factor, *given, **options)

    monkeypatch.setattr(anti_diffusion, "pgd", broken)
    result = protector.protect(images, seeds=seeds, groups=groups)
    assert [fact.failed is None for fact in result.facts] == [False, True, True]
    assert torch.equal(result.images[0], images[0])
    assert torch.equal(result.images[1], whole.images[1])
    assert (result.images[2] != images[2]).any()
