"""The customization attacks by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pipeline.errors import UserError
from pipeline.verify.customizers.base import Customizer
from pipeline.verify.customizers.custom_diffusion import CustomDiffusion
from pipeline.verify.customizers.dreambooth import DreamBooth
from pipeline.verify.customizers.lora import Lora
from pipeline.verify.customizers.textual_inversion import TextualInversion

CUSTOMIZERS: Mapping[str, type[Customizer]] = {
    attack.name: attack for attack in (DreamBooth, Lora, TextualInversion, CustomDiffusion)
}


def customizer(name: str, preset: str, overrides: Mapping[str, Any] | None = None) -> Customizer:
    """The attack of this name with the settings of one of its presets.

    Args:
        name: of the registry.
        preset: of the attack.
        overrides: fields that replace the preset's; `sampling` is a mapping of its own fields.

    Raises:
        UserError: there is no such attack, preset or field, or a value cannot work; the message names what exists.
    """
    if name not in CUSTOMIZERS:
        raise UserError(f"no customization attack named {name!r}; known: {', '.join(sorted(CUSTOMIZERS))}")
    presets = CUSTOMIZERS[name].presets()
    if preset not in presets:
        raise UserError(f"{name} has no preset {preset!r}; known: {', '.join(sorted(presets))}")
    chosen = presets[preset]
    changes = dict(overrides or {})
    try:
        if "sampling" in changes:
            changes["sampling"] = replace(chosen.sampling, **changes["sampling"])
        return replace(chosen, **changes)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} cannot take {dict(overrides or {})}: {error}") from error
