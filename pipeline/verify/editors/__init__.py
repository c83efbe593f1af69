"""The editing attacks, by name: settings of the literature, and quick ones for the embedded model."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from pipeline.verify.editors.base import Editor
from pipeline.verify.editors.diffedit import DiffEdit
from pipeline.verify.editors.inpaint import BlendedInpaint, Inpaint
from pipeline.verify.editors.instruct import InstructPix2Pix
from pipeline.verify.editors.masactrl import MasaCtrl
from pipeline.verify.editors.sdedit import SDEdit

EDITORS: Mapping[str, Editor] = MappingProxyType(
    {
        "sdedit-0.3": SDEdit(strength=0.3),
        "sdedit-0.5": SDEdit(strength=0.5),
        "sdedit-0.7": SDEdit(strength=0.7),
        "inpaint": Inpaint(),
        "inpaint-blended": BlendedInpaint(),
        "diffedit": DiffEdit(),
        "masactrl": MasaCtrl(),
        "instruct-pix2pix": InstructPix2Pix(),
        # Twenty steps: for the embedded model and for trials. Never in one table with the settings above.
        "sdedit-0.3-quick": SDEdit(strength=0.3, steps=20),
        "sdedit-0.5-quick": SDEdit(strength=0.5, steps=20),
        "sdedit-0.7-quick": SDEdit(strength=0.7, steps=20),
        "inpaint-quick": Inpaint(steps=20),
        "inpaint-blended-quick": BlendedInpaint(steps=20),
        "diffedit-quick": DiffEdit(steps=20, maps=5),
        "masactrl-quick": MasaCtrl(steps=20, from_step=2),
        "instruct-pix2pix-quick": InstructPix2Pix(steps=20),
    }
)
"""Every editor that a configuration may name."""
