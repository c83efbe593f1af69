"""Prompt tuning: an embedding that no text has, fitted to an image so that the model denoises it best."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def tune_prompts(loss: Callable[[Tensor, int], Tensor], start: Tensor, *, steps: int, rate: float) -> Tensor:
    """AdamW steps (betas 0.9 and 0.999, weight decay 0.01, new moments) on the embeddings alone.

    AdamW works value by value, so no row feels the others.

    Args:
        loss: (embeddings ``(B, L, D)``, step number) -> one loss per row ``(B,)``.
        start: embeddings to begin with; not changed.
        steps: how many; 0 returns a copy of ``start``.
        rate: learning rate.

    Returns:
        ``(B, L, D)`` float32, no graph.
    """
    embeddings = start.detach().clone().requires_grad_()
    optimizer = torch.optim.AdamW([embeddings], lr=rate, betas=(0.9, 0.999), weight_decay=1e-2)
    for step in range(steps):
        # Not backward(): it would leave gradients in whatever else the loss depends on.
        (embeddings.grad,) = torch.autograd.grad(loss(embeddings, step).sum(), [embeddings])
        optimizer.step()
    return embeddings.detach()
