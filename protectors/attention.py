"""The cross-attention of a UNet: which layers there are, and their probabilities while the model runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def cross_attention_layers(unet: Any) -> dict[int, list[Any]]:
    """Cross-attention layers of the down and up blocks, by how much smaller their grid is than that of the latents.

    Returns:
        Factor (1, 2, 4, ...) -> diffusers' ``Attention`` modules, in the order in which they run; factors without
        any are left out. The middle block's are never among them.
    """
    from diffusers.models.attention_processor import Attention

    downwards = [(2**number, block) for number, block in enumerate(unet.down_blocks)]
    upwards = [(2**number, block) for number, block in enumerate(reversed(unet.up_blocks))][::-1]
    levels: dict[int, list[Any]] = {}
    for factor, block in [*downwards, *upwards]:
        layers = [part for part in block.modules() if isinstance(part, Attention) and part.is_cross_attention]
        if layers:
            levels.setdefault(factor, []).extend(layers)
    return levels


@contextmanager
def recorded(layers: Sequence[Any]) -> Iterator[list[Tensor]]:
    """Keeps the attention probabilities of these layers, and of no others, for as long as it lasts.

    Scores and softmax are computed in float32 whatever the layer's dtype: in float16 they overflow in Stable
    Diffusion 2. At the end, also after an exception, every layer has its own processor again.

    Yields:
        A list that grows by one ``(B, heads, queries, keys)`` float32 at every run of a layer; rows sum to 1. The
        maps are part of the graph.
    """
    maps: list[Tensor] = []
    own = [layer.processor for layer in layers]
    try:
        for layer in layers:
            layer.set_processor(RecordingProcessor(maps))
        yield maps
    finally:
        for layer, processor in zip(layers, own, strict=True):
            layer.set_processor(processor)


@dataclass(frozen=True)
class RecordingProcessor:
    """diffusers' plain attention, masks, group norm, residual and all, on a layer that keeps its probabilities."""

    maps: list[Tensor]

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        from diffusers.models.attention_processor import AttnProcessor

        layer = _RecordedLayer(attn, self.maps)
        attended: Tensor = AttnProcessor()(layer, hidden_states, encoder_hidden_states, attention_mask, temb)
        return attended


@dataclass(frozen=True)
class _RecordedLayer:
    """An attention layer, except that it keeps what it computes."""

    layer: Any
    maps: list[Tensor]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)

    def get_attention_scores(self, query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
        mask = None if mask is None else mask.float()
        # Under autocast the product would be taken in half precision in spite of the casts.
        with torch.autocast(query.device.type, enabled=False):
            probabilities: Tensor = self.layer.get_attention_scores(query.float(), key.float(), mask)
        self.maps.append(probabilities.view(-1, self.layer.heads, *probabilities.shape[1:]))
        return probabilities.to(query.dtype)
