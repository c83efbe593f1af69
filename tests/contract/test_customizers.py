"""One contract for every registered customizer, on tiny random models. A new attack costs one row in ``EXPECTED``.

1. Randomness: the same seed gives the same weights, another one others; image i does not depend on the count.
2. Effect: the loss on the photo falls, also for v-prediction. What the presets reach on real models is not a unit test.
3. Side effects: the base stays bit by bit, and in the copy only what the method names has changed.
4. Form: bad input raises, presets exist, parameters survive JSON.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.verify.attack_models import load_pipeline
from pipeline.verify.customizers import CUSTOMIZERS, base, custom_diffusion, customizer
from pipeline.verify.customizers.base import PHOTO, Customized, Customizer, PriorImages, Sampling, sample
from pipeline.verify.customizers.custom_diffusion import CustomDiffusion
from pipeline.verify.customizers.dreambooth import DreamBooth
from pipeline.verify.customizers.lora import Lora
from pipeline.verify.customizers.textual_inversion import TextualInversion
from pipeline.verify.customizers.training import Lesson, subject_lesson
from protectors.schedule import NoiseSchedule
from tests.protectors.tiny import save_tiny_model

SIZE = 32
KINDS = ("epsilon", "v_prediction")


@dataclass(frozen=True)
class Expected:
    """What of the copy may differ from the base: parts of weights' names, and rows of the token embedding."""

    unet: tuple[str, ...] = ()
    text_encoder: tuple[str, ...] = ()
    new_rows: int = 0
    # Learning rate at which 15 updates tell on the tiny model.
    rate: float = 3e-3


EXPECTED = {
    "dreambooth": Expected(unet=("",), text_encoder=("",)),
    "lora": Expected(unet=("lora_",), rate=3e-2),
    "textual-inversion": Expected(new_rows=1, rate=3e-1),
    "custom-diffusion": Expected(unet=("attn2.to_k.", "attn2.to_v."), new_rows=1, rate=3e-2),
}
NAMES = sorted(CUSTOMIZERS)


def small(attack: Customizer, **changes: Any) -> Customizer:
    """The attack at a size that takes a fraction of a second."""
    sizes = {
        "steps": 2,
        "batch": 2,
        "bf16": False,
        "sampling": Sampling(steps=2, guidance=2.0, eta=attack.sampling.eta),
    }
    if hasattr(attack, "prior_images"):
        sizes["prior_images"] = min(attack.prior_images, 2)
    return replace(attack, **{**sizes, **changes})  # type: ignore[arg-type]


VARIANTS = [
    (small(DreamBooth.presets()["robust"], rate=1e-3), EXPECTED["dreambooth"]),
    (small(DreamBooth.presets()["apdm"], rate=1e-3), Expected(unet=("",))),
    (
        small(Lora.presets()["literature"], train_text_encoder=True, prior_images=1),
        Expected(unet=("lora_",), text_encoder=("lora_",)),
    ),
    (small(TextualInversion.presets()["literature"]), EXPECTED["textual-inversion"]),
    (small(CustomDiffusion.presets()["literature"]), EXPECTED["custom-diffusion"]),
]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("models")
    loaded = {}
    for kind in KINDS:
        folder = save_tiny_model(root / kind, prediction_type=kind)
        config = folder / "unet" / "config.json"  # attention over 64 px takes ten times as long
        config.write_text(config.read_text().replace('"sample_size": 32', f'"sample_size": {SIZE // 2}'))
        loaded[kind] = load_pipeline(folder)
    return loaded


@pytest.fixture(scope="module")
def model(models: dict[str, Any]) -> Any:
    return models["epsilon"]


def photos(count: int = 2) -> Tensor:
    coarse = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, size=(SIZE, SIZE), mode="bilinear")


def weights(pipeline: Any, name: str) -> dict[str, Tensor]:
    """Copies by the names they have without peft's wrappers."""
    state = getattr(pipeline, name).state_dict()
    return {key.replace(".base_layer", ""): weight.clone() for key, weight in state.items()}


def everything(pipeline: Any) -> dict[str, Any]:
    """All of a pipeline that an attack could leave a trace in."""
    facts: dict[str, Any] = {"words": pipeline.tokenizer.get_vocab()}
    for name in ("unet", "text_encoder", "vae"):
        network = getattr(pipeline, name)
        modules = [(key, type(module), module.training) for key, module in network.named_modules()]
        flags = {key: (weight.requires_grad, weight.grad is None) for key, weight in network.named_parameters()}
        facts[name] = (modules, flags, dict(network.config.to_dict() if name == "text_encoder" else network.config))
    facts["processors"] = [id(processor) for processor in pipeline.unet.attn_processors.values()]
    return facts


def assert_same_weights(left: Any, right: Any) -> None:
    for name in ("unet", "text_encoder"):
        one, other = weights(left, name), weights(right, name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def assert_only_changed(model: Any, customized: Customized, expected: Expected) -> None:
    """Exactly the expected weights have changed: others not, and of each expected kind at least one."""
    for name, parts in (("unet", expected.unet), ("text_encoder", expected.text_encoder)):
        before, after = weights(model, name), weights(customized.pipeline, name)
        assert before.keys() <= after.keys()
        changed = {key for key in after if key not in before or not equal_rows(before[key], after[key])}
        assert all(any(part in key for part in parts) for key in changed)
        assert all(any(part in key for key in changed) for part in parts)
    old, new = (pipeline.text_encoder.get_input_embeddings().weight for pipeline in (model, customized.pipeline))
    assert len(new) == len(old) + expected.new_rows == len(customized.pipeline.tokenizer)


def equal_rows(before: Tensor, after: Tensor) -> bool:
    """Whether all rows that were there are the same; rows may have been added."""
    return torch.equal(before, after[: len(before)]) and before.shape[1:] == after.shape[1:]


def loss(pipeline: Any, prompt: str) -> float:
    """Of denoising the first photo, at 16 fixed times with fixed noise."""
    schedule = NoiseSchedule.from_config(pipeline.scheduler.config)
    with torch.no_grad():
        latents = pipeline.vae.encode(photos(1) * 2 - 1).latent_dist.mean * pipeline.vae.config.scaling_factor
        noise = torch.randn((16, *latents.shape[1:]), generator=torch.Generator().manual_seed(1))
        times = torch.linspace(0, 999, 16).long()
        tokens = pipeline.tokenizer([prompt], padding="max_length", truncation=True, return_tensors="pt").input_ids
        text = pipeline.text_encoder(tokens)[0].expand(16, -1, -1)
        latents = latents.expand_as(noise)
        prediction = pipeline.unet(schedule.add_noise(latents, noise, times), times, text).sample
        return float((prediction - schedule.target(latents, noise, times)).square().mean())


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_decides_and_the_samples_change(name: str, model: Any) -> None:
    attack = small(customizer(name, "quick"), rate=EXPECTED[name].rate)
    first, again, other = (attack.customize(model, photos(), "tram", seed=seed) for seed in (1, 1, 2))
    assert first.subject == again.subject
    assert_same_weights(first.pipeline, again.pipeline)
    with pytest.raises(AssertionError):
        assert_same_weights(first.pipeline, other.pipeline)
    prompt = PHOTO.format(first.subject)
    images = sample(first.pipeline, prompt, 3, seed=5, sampling=attack.sampling)
    assert images.shape == (3, 3, SIZE, SIZE)
    assert 0 <= images.min() <= images.max() <= 1
    assert not torch.equal(images, sample(model, prompt, 3, seed=5, sampling=attack.sampling))
    # Each image has its own draws; only rounding may depend on how many are drawn together.
    assert torch.allclose(images[:1], sample(first.pipeline, prompt, 1, seed=5, sampling=attack.sampling), atol=1e-4)
    assert not torch.allclose(images[0], images[1], atol=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_the_base_stays_and_only_named_weights_change(name: str, model: Any) -> None:
    facts, before = everything(model), {part: weights(model, part) for part in ("unet", "text_encoder", "vae")}
    attack = small(customizer(name, "quick"), rate=EXPECTED[name].rate)
    customized = attack.customize(model, photos(), "tram", seed=1)
    assert everything(model) == facts
    assert all(torch.equal(old, weights(model, part)[key]) for part in before for key, old in before[part].items())
    assert_only_changed(model, customized, EXPECTED[name])
    own = customized.pipeline
    assert {type(one) for one in own.unet.attn_processors.values()} == {
        type(one) for one in model.unet.attn_processors.values()
    }
    for network in (own.unet, own.text_encoder):
        assert not network.training
        assert not any(weight.requires_grad for weight in network.parameters())


@pytest.mark.parametrize(("attack", "expected"), VARIANTS, ids=lambda value: getattr(value, "name", ""))
def test_variants_change_what_they_name(attack: Customizer, expected: Expected, model: Any) -> None:
    customized = attack.customize(model, photos(), "tram", seed=1)
    assert_only_changed(model, customized, expected)
    assert torch.isfinite(torch.cat([weight.flatten() for weight in customized.pipeline.unet.parameters()])).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_training_lowers_the_loss_on_the_subject(name: str, kind: str, models: dict[str, Any]) -> None:
    attack = small(customizer(name, "quick"), steps=15, rate=EXPECTED[name].rate)
    trained = attack.customize(models[kind], photos(1), "x", seed=0)
    start = small(attack, steps=1, rate=0.0).customize(models[kind], photos(1), "x", seed=0)
    prompt = PHOTO.format(trained.subject)
    # One row of the embedding moves a random network by little.
    share = 0.995 if name == "textual-inversion" else 0.8
    assert loss(trained.pipeline, prompt) < share * loss(start.pipeline, prompt)


@pytest.mark.parametrize("name", NAMES)
def test_bad_input_is_refused(name: str, model: Any, models: dict[str, Any]) -> None:
    attack = small(customizer(name, "quick"))
    for shape in ((1, 3, SIZE, 40), (1, 1, SIZE, SIZE), (0, 3, SIZE, SIZE)):
        with pytest.raises(ValueError, match=r"images must be \(N, 3, 32, 32\), the model's size, not"):
            attack.customize(model, torch.rand(shape), "tram", seed=0)
    with pytest.raises(ValueError, match="class images are of another pipeline"):
        attack.customize(model, photos(), "tram", seed=0, priors=PriorImages(models["v_prediction"]))
    for field in ("steps", "batch"):
        with pytest.raises(ValueError, match=f"{field} must be at least 1, not 0"):
            replace(attack, **{field: 0})


def test_cells_share_class_images(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    draw = base.sample_latents

    def spy(pipeline: Any, prompt: str, count: int, **rest: Any) -> Tensor:
        drawn.append(prompt)
        return draw(pipeline, prompt, count, **rest)

    monkeypatch.setattr(base, "sample_latents", spy)
    attack = small(customizer("dreambooth", "quick"))
    priors = PriorImages(model)
    shared = [attack.customize(model, images, "tram", seed=1, priors=priors) for images in (photos(), photos() / 2)]
    assert drawn == ["a photo of a tram"]
    assert_same_weights(attack.customize(model, photos() / 2, "tram", seed=1).pipeline, shared[1].pipeline)
    assert len(drawn) == 2
    attack.customize(model, photos(), "tram", seed=2, priors=priors)
    attack.customize(model, photos(), "mug", seed=2, priors=priors)
    assert drawn[2:] == ["a photo of a tram", "a photo of a mug"]


def test_prior_preservation_keeps_the_class(model: Any) -> None:
    """With all weight on class images the subject is not learned; with none the class is forgotten."""
    attack = small(customizer("dreambooth", "quick"), steps=8, rate=3e-3)
    heavy, none = (replace(attack, prior_weight=weight) for weight in (100.0, 0.0))  # type: ignore[call-arg]
    subject = PHOTO.format("sks x")
    losses = [loss(one.customize(model, photos(1), "x", seed=0).pipeline, subject) for one in (heavy, none)]
    assert losses[0] > losses[1]


def test_the_robust_attacker_sees_blurred_photos(model: Any) -> None:
    """A pattern of single pixels is invisible to it, and plain to the other."""
    checks = ((torch.arange(SIZE)[:, None] + torch.arange(SIZE)) % 2).float() * 0.5 - 0.25
    clean, patterned = (torch.full((1, 3, SIZE, SIZE), 0.5) + pattern for pattern in (0.0, checks))

    def distance(robust: bool) -> float:
        attack = small(DreamBooth.presets()["literature"], rate=1e-3, robust=robust)
        left, right = (attack.customize(model, images, "x", seed=0).pipeline for images in (clean, patterned))
        pairs = zip(left.unet.parameters(), right.unet.parameters(), strict=True)
        return sum(float((one - other).abs().sum()) for one, other in pairs)

    assert distance(robust=True) < 0.5 * distance(robust=False)


def test_scaled_photos_train_where_they_are_and_say_so(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Tensor, Sequence[str], Tensor]] = []

    def spy(pipeline: Any, images: Tensor, prompts: Sequence[str], valid: Tensor) -> Lesson:
        seen.append((images, prompts, valid))
        return subject_lesson(pipeline, images, prompts, valid)

    monkeypatch.setattr(custom_diffusion, "subject_lesson", spy)
    attack = small(CustomDiffusion.presets()["literature"])
    attack.customize(model, torch.ones(2, 3, SIZE, SIZE), "x", seed=0)
    ((views, prompts, valid),) = seen
    assert len(views) == len(prompts) == len(valid) == 2 * 2 * 8  # photos, mirror images, views
    white = (views > 0.75).all(dim=1, keepdim=True).float()
    assert torch.allclose(views, 0.5 + white.expand_as(views) / 2, atol=1e-5)
    assert torch.equal(valid, (torch.nn.functional.avg_pool2d(white, 2) == 1).float())
    sides = white.mean(dim=(1, 2, 3)).sqrt()
    assert 0.39 < float(sides.min()) < 0.5
    assert float(sides.max()) == 1
    for side, prompt in zip(sides.tolist(), prompts, strict=True):
        assert prompt.startswith("a photo of a <subject> x")
        if side < 0.68:
            assert prompt.endswith((", very small", ", far away"))
        elif 0.72 < side < 1:
            assert prompt.endswith(" x")
    assert any(prompt.endswith((", zoomed in", ", close up")) for prompt in prompts)


def test_a_word_that_exists_is_refused(model: Any) -> None:
    attack = replace(small(customizer("textual-inversion", "quick")), word="a</w>")  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="knows 'a</w>' already"):
        attack.customize(model, photos(), "tram", seed=0)
    with pytest.raises(ValueError, match="gives no token"):
        small(customizer("textual-inversion", "quick")).customize(model, photos(), " ", seed=0)


def test_the_registry() -> None:
    assert set(EXPECTED) == set(CUSTOMIZERS)
    for name, kind in CUSTOMIZERS.items():
        assert kind.name == name
        assert {"literature", "quick"} <= set(kind.presets())
        for attack in kind.presets().values():
            assert json.loads(json.dumps(attack.parameters()))["name"] == name
    with pytest.raises(UserError, match="no customization attack named 'dream'; known: custom-diffusion, dreambooth"):
        customizer("dream", "quick")
    with pytest.raises(UserError, match="lora has no preset 'paper'; known: literature, quick"):
        customizer("lora", "paper")
