"""MasaCtrl: the edited image looks up its content in the original, through the UNet's self-attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pipeline.verify.editors.base import Edit, Editor
from pipeline.verify.editors.pipelines import check_schedule, decode, encode, inverse_ddim, rebuild
from protectors.model_files import ModelError


@dataclass(frozen=True, kw_only=True)
class MasaCtrl(Editor):
    """Denoises source and target side by side from the inverted noise; the target attends to the source.

    MasaCtrl: Tuning-Free Mutual Self-Attention Control for Consistent Image Synthesis and Editing (Cao et al.,
    ICCV 2023, https://arxiv.org/abs/2304.08465), Equation 5 and Algorithm 1, without the optional masks. From
    `from_step` on and in the decoder's `levels` finest blocks, the target's queries meet the source's keys and
    values, in each half of the guidance its own. In Stable Diffusion 1.4, 2 levels are its self-attention layers
    10 to 15 of 0 to 15, the paper's choice; a rule by block holds for other layouts too.

    The source branch is not sampled but takes the latents of its own inversion, as the authors advise for real
    images. Nothing is random: every seed gives the same pixels.
    """

    name: ClassVar[str] = "masactrl"
    # All of them are executed, there and back.
    steps: int = 50
    # Classifier-free guidance; 1 turns it off.
    guidance: float = 7.5
    # First step, counted from 0, that attends to the source; `steps` for none.
    from_step: int = 4
    # How many of the decoder's blocks do, counted from its output.
    levels: int = 2

    def __post_init__(self) -> None:
        check_schedule(self.name, self.steps)
        if not 0 <= self.from_step <= self.steps or self.levels < 1:
            raise ValueError(
                f"{self.name}: from_step {self.from_step} of {self.steps} steps, {self.levels} levels;"
                " choose 0 to steps, and at least 1 level"
            )

    def _edit(self, given: Any, image: Tensor, edit: Edit, generator: torch.Generator, mask: Tensor) -> Tensor:
        from diffusers import StableDiffusionPipeline

        inverted = invert(given, encode(given, image), edit.source, steps=self.steps)
        with mutual_attention(given.unet, self.levels) as mutual:
            mutual.on = self.from_step == 0

            def follow(pipeline: Any, step: int, t: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
                mutual.on = step + 1 >= self.from_step
                return {"latents": torch.cat([inverted[-2 - step], state["latents"][1:]])}

            # The pipeline's batch is (source, target), with guidance twice: the pairs that the attention expects.
            latents = rebuild(StableDiffusionPipeline, given)(
                [edit.source, edit.target],
                latents=inverted[-1].repeat(2, 1, 1, 1),
                num_inference_steps=self.steps,
                guidance_scale=self.guidance,
                callback_on_step_end=follow,
                output_type="latent",
            ).images
        return decode(given, latents[1:])


def invert(given: Any, latents: Tensor, prompt: str, *, steps: int) -> list[Tensor]:
    """DDIM inversion without guidance (Song et al., https://arxiv.org/abs/2010.02502, Section 4.3).

    Args:
        given: the checkpoint's pipeline.
        latents: scaled, `(1, C, h, w)`.
        prompt: describes the image.
        steps: of the whole schedule.

    Returns:
        `steps + 1` latents of that shape: the given ones first, those at the highest noise level last.
    """
    from diffusers import StableDiffusionPipeline

    levels = [latents]

    def keep(pipeline: Any, step: int, t: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        levels.append(state["latents"])
        return state

    rebuild(StableDiffusionPipeline, given, scheduler=inverse_ddim(given))(
        prompt,
        latents=latents,
        num_inference_steps=steps,
        guidance_scale=1.0,
        callback_on_step_end=keep,
        output_type="latent",
    )
    return levels


@dataclass
class MutualSwitch:
    """Turns all the mutual attention of one UNet on or off."""

    on: bool = False


@dataclass(frozen=True)
class MutualAttention:
    """Self-attention of pairs (source, target), one after the other in the batch: both look into the source.

    It is the layer's own processor, given the source's hidden states for the keys and values of both.
    """

    own: Any
    switch: MutualSwitch

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        if self.switch.on:
            encoder_hidden_states = hidden_states[::2].repeat_interleave(2, dim=0)
        attended: Tensor = self.own(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        return attended


@contextmanager
def mutual_attention(unet: Any, levels: int) -> Iterator[MutualSwitch]:
    """Puts mutual attention, switched off, into the finest decoder blocks of a UNet, for as long as it lasts.

    Raises:
        ModelError: there is no self-attention in these blocks.
    """
    switch, own = MutualSwitch(), unet.attn_processors
    layers = finest_self_attention(unet, levels)
    try:
        # diffusers empties the dictionary that it is given.
        unet.set_attn_processor({**own, **{name: MutualAttention(own[name], switch) for name in layers}})
        yield switch
    finally:
        unet.set_attn_processor(dict(own))


def finest_self_attention(unet: Any, levels: int) -> list[str]:
    """Names of the self-attention processors in the last `levels` blocks of the decoder."""
    blocks = [f"up_blocks.{number}." for number in range(len(unet.up_blocks))][-levels:]
    names = [name for name in unet.attn_processors if name.startswith(tuple(blocks)) and ".attn1." in name]
    if not names:
        raise ModelError(f"no self-attention in {blocks} of the UNet; choose more levels")
    return names
