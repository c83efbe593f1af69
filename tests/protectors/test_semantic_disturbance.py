"""The semantic disturbance loss of Anti-Diffusion, on attention that is known."""

from __future__ import annotations

import torch

from protectors.anti_diffusion import mean_attention, semantic_disturbance


def test_uniform_and_certain_attention_have_their_known_losses() -> None:
    uniform = torch.full((2, 6, 77), 1 / 77)
    certain = torch.zeros(2, 6, 77)
    certain[..., 0] = 1
    torch.testing.assert_close(semantic_disturbance(uniform, 100.0), torch.tensor([-1.0, -1.0]))
    torch.testing.assert_close(semantic_disturbance(certain, 100.0), torch.tensor([-1 / 77] * 2))
    # Without the cut the optimum is the opposite.
    torch.testing.assert_close(semantic_disturbance(uniform, None), torch.tensor([-1.0, -1.0]))
    torch.testing.assert_close(semantic_disturbance(certain, None), torch.tensor([-77.0, -77.0]))


def test_disturbance_pushes_weak_attention_only() -> None:
    logits = torch.randn(1, 5, 77, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    attention = logits.softmax(-1).requires_grad_()
    (gradient,) = torch.autograd.grad(semantic_disturbance(attention, 100.0).sum(), attention)
    strong = attention >= 0.01
    assert 0 < strong.sum() < strong.numel()
    assert (gradient[strong] == 0).all()
    torch.testing.assert_close(gradient[~strong], -2e4 * attention.detach()[~strong] / (5 * 77))
    logits.requires_grad_()
    before = semantic_disturbance(logits.softmax(-1), 100.0).sum()
    (uphill,) = torch.autograd.grad(before, logits)
    assert semantic_disturbance((logits + uphill).softmax(-1), 100.0).sum() > before


def test_attention_is_averaged_over_layers_and_the_chosen_heads() -> None:
    maps = [torch.rand(2, 4, 3, 5), torch.rand(2, 2, 3, 5)]
    everything = (maps[0].sum(1) + maps[1].sum(1)) / 6
    torch.testing.assert_close(mean_attention(maps, "all"), everything)
    second = (maps[0][:, 2:].sum(1) + maps[1][:, 1:].sum(1)) / 3
    torch.testing.assert_close(mean_attention(maps, "second_half"), second)
