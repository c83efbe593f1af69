"""The customization attacks by name."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.errors import UserError
from pipeline.verify.customizers.base import Customizer
from pipeline.verify.customizers.custom_diffusion import CustomDiffusion
from pipeline.verify.customizers.dreambooth import DreamBooth
from pipeline.verify.customizers.lora import Lora
from pipeline.verify.customizers.textual_inversion import TextualInversion

CUSTOMIZERS: Mapping[str, type[Customizer]] = {
    attack.name: attack for attack in (DreamBooth, Lora, TextualInversion, CustomDiffusion)
}


def customizer(name: str, preset: str) -> Customizer:
    """The attack of this name with the settings of one of its presets.

    Raises:
        UserError: there is no such attack or preset; the message names those that exist.
    """
    if name not in CUSTOMIZERS:
        raise UserError(f"no customization attack named {name!r}; known: {', '.join(sorted(CUSTOMIZERS))}")
    presets = CUSTOMIZERS[name].presets()
    if preset not in presets:
        raise UserError(f"{name} has no preset {preset!r}; known: {', '.join(sorted(presets))}")
    return presets[preset]
