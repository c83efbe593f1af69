"""Recording of cross-attention: the right layers, the right numbers, and a UNet that does not notice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor

from protectors.attention import cross_attention_layers, recorded
from protectors.diffusion import DiffusionModel, load_model
from protectors.surrogate import LoraSurrogates
from tests.protectors.tiny import save_tiny_model

TOKENS = 77


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    """Stable Diffusion's UNet with few channels."""
    torch.manual_seed(0)
    network: UNet2DConditionModel = UNet2DConditionModel(
        sample_size=16, block_out_channels=(4, 4, 8, 8), norm_num_groups=2, attention_head_dim=2, cross_attention_dim=6
    )
    return network.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    return load_model(str(save_tiny_model(tmp_path_factory.mktemp("tiny"))))


def run(unet: Any, height: int = 16, width: int = 24, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    noisy = torch.randn(batch, 4, height, width, generator=generator)
    text = torch.randn(batch, TOKENS, 6, generator=generator)
    with torch.no_grad():
        output: Tensor = unet(noisy, torch.tensor([500] * batch), encoder_hidden_states=text).sample
    return output


def test_layers_are_found_by_the_size_of_their_grid(unet: UNet2DConditionModel) -> None:
    levels = cross_attention_layers(unet)
    assert {factor: len(layers) for factor, layers in levels.items()} == {1: 5, 2: 5, 4: 5}
    middle = set(unet.mid_block.modules())
    assert all(layer.is_cross_attention and layer not in middle for layers in levels.values() for layer in layers)


@pytest.mark.parametrize("size", [(16, 16), (8, 24), (32, 16)])
@pytest.mark.parametrize("factor", [1, 2, 4])
def test_maps_have_the_grid_of_their_level(unet: UNet2DConditionModel, size: tuple[int, int], factor: int) -> None:
    layers = cross_attention_layers(unet)[factor]
    with recorded(layers) as maps:
        run(unet, *size)
    queries = size[0] * size[1] // factor**2
    assert [tuple(each.shape) for each in maps] == [(2, layer.heads, queries, TOKENS) for layer in layers]
    for each in maps:
        torch.testing.assert_close(each.sum(-1), torch.ones_like(each[..., 0]))


def test_maps_agree_with_a_computation_in_float64(unet: UNet2DConditionModel) -> None:
    layers = cross_attention_layers(unet)[4]
    seen: list[tuple[Any, Tensor, Tensor]] = []

    def keep(layer: Any, arguments: tuple[Tensor, ...], options: dict[str, Any]) -> None:
        seen.append((layer, arguments[0].double(), options["encoder_hidden_states"].double()))

    handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
    with recorded(layers) as maps:
        run(unet)
    for handle in handles:
        handle.remove()
    assert len(maps) == len(seen) == 5
    for recorded_map, (layer, image, text) in zip(maps, seen, strict=True):
        query, key = image @ layer.to_q.weight.double().T, text @ layer.to_k.weight.double().T
        width = query.shape[-1] // layer.heads
        for head in range(layer.heads):
            part = slice(head * width, (head + 1) * width)
            scores = torch.einsum("bqd,bkd->bqk", query[..., part], key[..., part]) / width**0.5
            expected = scores.exp() / scores.exp().sum(-1, keepdim=True)
            torch.testing.assert_close(recorded_map[:, head].double(), expected, rtol=1e-4, atol=0)


def record_and_stop(unet: Any, layers: list[Any]) -> None:
    with recorded(layers):
        assert all(type(layer.processor).__name__ == "RecordingProcessor" for layer in layers)
        raise RuntimeError("stopped")


def test_only_these_layers_record_and_all_are_restored(unet: UNet2DConditionModel) -> None:
    before, own, layers = run(unet), unet.attn_processors, cross_attention_layers(unet)[2]
    with recorded(layers) as maps:
        changed = {name for name, each in unet.attn_processors.items() if each is not own[name]}
        run(unet)
    assert len(changed) == len(maps) == 5
    assert all(".attn2." in name for name in changed)
    with pytest.raises(RuntimeError, match="stopped"):
        record_and_stop(unet, layers)
    assert all(each is own[name] for name, each in unet.attn_processors.items())
    assert torch.equal(run(unet), before)


def test_recording_changes_no_prediction_and_sees_low_rank_deltas(model: DiffusionModel) -> None:
    layers = cross_attention_layers(model.unet)[1]
    noisy, t, text = torch.randn(1, 4, 16, 16), torch.tensor([300]), model.embed_prompts(["a photo"])
    recordings = []
    with LoraSurrogates(model, [1]) as surrogates, surrogates.owned([0]), torch.no_grad():
        for spread in (0.0, 0.3):
            surrogates.load(tuple(torch.randn_like(weights) * spread for weights in surrogates.parameters))
            plain = model.predict(noisy, t, text)
            with recorded(layers) as maps:
                assert torch.equal(model.predict(noisy, t, text), plain)
            recordings.append(maps)
    assert not torch.allclose(recordings[0][0], recordings[1][0])


def test_options_of_the_layer_are_respected() -> None:
    torch.manual_seed(0)
    options = {"heads": 2, "dim_head": 4, "norm_num_groups": 4, "residual_connection": True, "upcast_attention": True}
    layer = Attention(
        query_dim=8, cross_attention_dim=6, rescale_output_factor=2.0, cross_attention_norm="layer_norm", **options
    )
    image, text, mask = torch.randn(3, 5, 8), torch.randn(3, 7, 6), torch.zeros(3, 1, 7)
    mask[1, :, 4:] = -10_000
    plain = layer(image, encoder_hidden_states=text, attention_mask=mask)
    with recorded([layer]) as maps:
        torch.testing.assert_close(layer(image, encoder_hidden_states=text, attention_mask=mask), plain)
    (probabilities,) = maps
    assert probabilities.shape == (3, 2, 5, 7)
    assert (probabilities[1, :, :, 4:] == 0).all()
    assert (probabilities[0] > 0).all()
    probabilities[..., 0].sum().backward()
    assert layer.to_q.weight.grad.abs().sum() > 0


def test_scores_do_not_overflow_in_half_precision() -> None:
    layer = Attention(query_dim=8, cross_attention_dim=8, heads=1, dim_head=8)
    for projection in (layer.to_q, layer.to_k):
        projection.weight.data = torch.eye(8) * 200
    layer.half()
    image = torch.full((1, 2, 8), 1.0).half()  # scores of 8 * 200^2 / sqrt(8), beyond float16's 65504
    with recorded([layer]) as maps:
        output = layer(image, encoder_hidden_states=image)
    assert maps[0].dtype == torch.float32
    torch.testing.assert_close(maps[0], torch.full((1, 1, 2, 2), 0.5))
    assert output.dtype == torch.float16
    assert output.isfinite().all()
