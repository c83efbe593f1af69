"""What is true of single editing methods: what may influence what, inversion comes back, who attends to whom."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor

from pipeline.verify.attack_models import AttackModels, ModelKind
from pipeline.verify.editors.base import Edit, Editor, model_stride
from pipeline.verify.editors.diffedit import DiffEdit
from pipeline.verify.editors.inpaint import BlendedInpaint, Inpaint
from pipeline.verify.editors.masactrl import (
    MasaCtrl,
    MutualAttention,
    MutualSwitch,
    finest_self_attention,
    invert,
    mutual_attention,
)
from pipeline.verify.editors.pipelines import encode, rebuild
from pipeline.verify.editors.sdedit import SDEdit
from pipeline.verify.padding import pad_to_multiple
from protectors.model_files import ModelError
from tests.pipeline.edit_models import middle_masks, pictures, save_edit_models, save_eight_channel_model
from tests.protectors.tiny import WIDTH

WISH = Edit(target="a red fox", source="a dog")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> AttackModels:
    return AttackModels(save_edit_models(tmp_path_factory.mktemp("models")))


def run(editor: Editor, image: Tensor, models: AttackModels, masks: Tensor | None = None) -> Tensor:
    return editor.edit(image, [WISH], seeds=[1], models=models, masks=masks)


def test_mirroring_is_numpys_at_every_size() -> None:
    for side in range(1, 301):
        row = torch.arange(3 * side).reshape(1, 1, 3, side)
        padded = pad_to_multiple(row, 32)
        assert padded.shape[-2] % 32 == padded.shape[-1] % 32 == 0
        expected = np.pad(row[0, 0].numpy(), ((0, 29), (0, -side % 32)), mode="reflect")
        assert np.array_equal(padded[0, 0].numpy(), expected)


@pytest.mark.parametrize("editor", [SDEdit(steps=4), BlendedInpaint(steps=4), DiffEdit(steps=3), MasaCtrl(steps=4)])
def test_eight_latent_channels(editor: Editor, tmp_path: Path) -> None:
    models, image = AttackModels({ModelKind.LATENT: save_eight_channel_model(tmp_path)}), pictures(1)
    masks = middle_masks(image) if editor.needs_mask else None
    assert not torch.equal(run(editor, image, models, masks), image)


def test_inpainting_at_full_strength_knows_nothing_of_the_masked_area(models: AttackModels) -> None:
    one, other = pictures(1), pictures(1)
    masks = middle_masks(one)
    other[masks.expand_as(other) == 1] = 0
    for strength, blind in ((1.0, True), (0.7, False)):
        results = [run(Inpaint(steps=4, strength=strength), image, models, masks) for image in (one, other)]
        assert torch.equal(*[result[masks.expand_as(result) == 1] for result in results]) == blind


def test_blending_ends_on_the_kept_latents(models: AttackModels) -> None:
    given, image = models.get(ModelKind.LATENT), pictures(1, 32, 32).float() / 255
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 5, 9] = 1  # a pixel of the latent (2, 4)
    decoded: list[Tensor] = []
    hook = given.vae.post_quant_conv.register_forward_pre_hook(lambda layer, inputs: decoded.append(inputs[0]))
    with torch.no_grad():
        kept = encode(given, image)
        BlendedInpaint(steps=4)._edit(given, image, WISH, torch.Generator().manual_seed(0), mask)
    hook.remove()
    changed = (decoded[0] * given.vae.config.scaling_factor != kept).any(1)[0]
    assert changed.nonzero().tolist() == [[2, 4]]


def test_diffedit_refuses_prompts_between_which_nothing_differs(models: AttackModels) -> None:
    with pytest.raises(ValueError, match="nothing to edit"):
        DiffEdit(steps=4).edit(pictures(1), [Edit(target="a  dog", source="a dog")], seeds=[1], models=models)


def test_inversion_comes_back() -> None:
    """Relative error of the latents after inversion and sampling: 11 % at 40 steps on a drawing. It falls with more
    steps; on a random model there is no bound, the equation it solves is not smooth."""
    given, errors = AttackModels().get(ModelKind.LATENT), {}
    with torch.no_grad():
        latents = encode(given, pictures(1, 128, 128).float() / 255)
        for steps in (10, 40):
            levels = invert(given, latents, "a photo of a dog", steps=steps)
            assert len(levels) == steps + 1
            assert torch.equal(levels[0], latents)
            back = rebuild(StableDiffusionPipeline, given)(
                "a photo of a dog",
                latents=levels[-1],
                num_inference_steps=steps,
                guidance_scale=1.0,
                output_type="latent",
            ).images
            errors[steps] = float((back - latents).norm() / latents.norm())
    assert errors[40] < 0.15
    assert errors[40] < 0.5 * errors[10]


@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_masactrl_without_mutual_attention_is_plain_sampling(models: AttackModels, guidance: float) -> None:
    """Equal to within a level: the pair is one batch, and sums over a batch round differently."""
    given, image = models.get(ModelKind.LATENT), pictures(1)
    editor = MasaCtrl(steps=3, from_step=3, guidance=guidance)
    plain = rebuild(StableDiffusionPipeline, given)
    with torch.no_grad():
        padded = pad_to_multiple(image.float() / 255, model_stride(given))
        noise = invert(given, encode(given, padded), WISH.source, steps=3)[-1]
        sampled = plain(
            WISH.target, latents=noise, num_inference_steps=3, guidance_scale=guidance, output_type="pt"
        ).images
    expected = (sampled[..., : image.shape[2], : image.shape[3]] * 255).round()
    without = run(editor, image, models)
    assert (without - expected).abs().max() <= 1
    assert not torch.equal(run(replace(editor, from_step=0), image, models), without)


@pytest.mark.parametrize("own", [AttnProcessor(), AttnProcessor2_0()], ids=lambda own: type(own).__name__)
def test_mutual_attention_takes_keys_and_values_of_the_source_of_its_half(own: Any) -> None:
    torch.manual_seed(0)
    layer = Attention(query_dim=12, heads=3, dim_head=4)
    switch = MutualSwitch(on=True)
    states = torch.randn(4, 5, 12)  # source and target without prompt, source and target with it
    with torch.no_grad():
        attended = MutualAttention(own, switch)(layer, states)
        for row, source in enumerate((0, 0, 2, 2)):
            queries = layer.to_q(states[row]).unflatten(1, (3, 4))
            keys, values = (to(states[source]).unflatten(1, (3, 4)) for to in (layer.to_k, layer.to_v))
            weights = (torch.einsum("qhd,khd->hqk", queries, keys) / 2).softmax(-1)
            expected = layer.to_out[0](torch.einsum("hqk,khd->qhd", weights, values).flatten(1))
            assert torch.allclose(attended[row], expected, atol=1e-6)
        switch.on = False
        assert torch.equal(MutualAttention(own, switch)(layer, states), own(layer, states))


def test_the_rule_by_block_is_the_papers_layers_in_stable_diffusion() -> None:
    down = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    unet = UNet2DConditionModel(
        down_block_types=down,
        up_block_types=up,
        block_out_channels=(4, 4, 4, 4),
        norm_num_groups=2,
        attention_head_dim=2,
        cross_attention_dim=WIDTH,
    )
    layers: list[str] = []  # of self-attention, as the paper counts: in the order in which they are passed
    for name, module in unet.named_modules():
        if name.endswith("attn1"):
            module.register_forward_pre_hook(lambda *_, name=name: layers.append(name))
    with torch.no_grad():
        unet(torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 3, WIDTH))
    assert len(layers) == 16
    assert {f"{name}.processor" for name in layers[10:]} == set(finest_self_attention(unet, 2))


def test_masactrls_source_walks_back_through_its_inversion(models: AttackModels) -> None:
    given, image, seen = models.get(ModelKind.LATENT), pictures(1, 32, 32), []
    hook = given.unet.register_forward_pre_hook(lambda unet, inputs: seen.append((inputs[0], int(inputs[1]))))
    run(MasaCtrl(steps=3, from_step=1), image, models)
    hook.remove()
    with torch.no_grad():
        levels = invert(given, encode(given, image.float() / 255), WISH.source, steps=3)
    assert [t for _, t in seen] == [1, 334, 667, 667, 334, 1]
    for level, (batch, _) in zip(reversed(levels), seen[3:], strict=False):
        source, target, source_again, target_again = batch
        assert torch.equal(source, level[0])
        assert torch.equal(source_again, source)
        assert torch.equal(target_again, target)
        assert torch.equal(target, source) == (level is levels[-1])


def test_mutual_attention_is_taken_out_when_sampling_fails(models: AttackModels) -> None:
    given, passes = models.get(ModelKind.LATENT), [0]
    before = dict(given.unet.attn_processors)

    def fail_late(*_: Any) -> None:
        passes[0] += 1
        if passes[0] == 5:  # three of the inversion, then the second of the sampling
            assert given.unet.attn_processors != before
            raise MemoryError("no room")

    hook = given.unet.register_forward_pre_hook(fail_late)
    with pytest.raises(MemoryError):
        run(MasaCtrl(steps=3, from_step=1), pictures(1), models)
    hook.remove()
    assert given.unet.attn_processors == before


def test_a_decoder_level_without_self_attention_is_refused() -> None:
    unet = UNet2DConditionModel(
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        norm_num_groups=4,
        cross_attention_dim=WIDTH,
        attention_head_dim=8,
    )
    before = unet.attn_processors
    with pytest.raises(ModelError, match="no self-attention"), mutual_attention(unet, 1):
        pass
    assert unet.attn_processors == before


def test_the_scheduler_is_our_own(models: AttackModels) -> None:
    """The checkpoint comes with DDIM; ours differs in what inversion needs, and is another object."""
    given = models.get(ModelKind.LATENT)
    ours = rebuild(StableDiffusionPipeline, given).scheduler
    assert isinstance(ours, DDIMScheduler)
    assert ours is not given.scheduler
    assert torch.equal(ours.alphas_cumprod, given.scheduler.alphas_cumprod)
    assert (ours.config.clip_sample, ours.config.set_alpha_to_one, ours.config.steps_offset) == (False, False, 1)
