"""The purifiers by name, and the suites that a check may run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from pipeline.errors import UserError
from pipeline.verify.attack_models import AttackModels, ModelKind, ModelMissing
from pipeline.verify.purifiers.adverse_cleaner import AdverseCleaner
from pipeline.verify.purifiers.base import Purifier
from pipeline.verify.purifiers.diffpure import DiffPure, ResizeOnly
from pipeline.verify.purifiers.gridpure import GrIDPure
from pipeline.verify.purifiers.impress import ImpressLite
from pipeline.verify.purifiers.latent import LDMPure, RoundTrip
from pipeline.verify.purifiers.transforms import (
    BitDepth,
    Chain,
    CropAndResize,
    GaussianBlur,
    Jpeg,
    Median,
    Noise,
    Resample,
    Resampling,
    Shift,
    TotalVariation,
)
from pipeline.verify.purifiers.upscale import NoisyUpscaling, PDMPure, Upscaling

PURIFIERS: Mapping[str, Purifier] = MappingProxyType(
    {
        "jpeg95": Jpeg(quality=95),
        "jpeg85": Jpeg(quality=85),
        "jpeg75": Jpeg(quality=75),
        "jpeg65": Jpeg(quality=65),
        "jpeg50": Jpeg(quality=50),
        "half-size": Resample(factor=0.5, resampling=Resampling.LANCZOS),
        "three-quarter-size": Resample(factor=0.75, resampling=Resampling.BICUBIC),
        "chain": Chain(),
        "crop": CropAndResize(),
        "shift": Shift(),
        # Standard deviations: Pillow's "radius 1", and what OpenCV derives from windows of 5 and 7.
        "blur": GaussianBlur(size=7, sigma=1.0),
        "blur5": GaussianBlur(size=5, sigma=1.1),
        "blur7": GaussianBlur(size=7, sigma=1.4),
        "median": Median(),
        "noise": Noise(),
        "bit-depth-5": BitDepth(bits=5),
        "bit-depth-3": BitDepth(bits=3),
        "total-variation": TotalVariation(),
        "bilateral": AdverseCleaner(guided_rounds=0),
        "adverse-cleaner": AdverseCleaner(),
        "vae": RoundTrip(),
        "ldm-0.1": LDMPure(strength=0.1),
        "ldm-0.2": LDMPure(strength=0.2),
        "ldm-0.3": LDMPure(strength=0.3),
        "ldm-0.3-noise-free": LDMPure(strength=0.3, guidance=7.5, prompt="noise-free"),
        "resize-only": ResizeOnly(),
        "diffpure-50": DiffPure(t=50),
        "diffpure-100": DiffPure(t=100),
        "diffpure-150": DiffPure(t=150),
        "pixel-sdedit": DiffPure(t=100, steps=10),
        "gridpure": GrIDPure(),
        "gridpure-40": GrIDPure(iterations=40),
        "gridpure-upstream": GrIDPure(upstream=True),
        "impress-lite": ImpressLite(),
        "noisy-upscaling": NoisyUpscaling(),
        "noisy-upscaling-320": NoisyUpscaling(upscaling=Upscaling(noise_level=320)),
        "pdm-pure": PDMPure(),
        # For a CPU, with a part of the published steps: never one row with the numbers of the full ones.
        "diffpure-100-quick": DiffPure(t=100, steps=20),
        "gridpure-quick": GrIDPure(iterations=4),
        "impress-lite-quick": ImpressLite(iterations=100),
        "noisy-upscaling-quick": NoisyUpscaling(quarter_first=True, upscaling=Upscaling(noise_level=320, steps=15)),
    }
)
"""All purifiers, by name. A name stands for its parameters: they change with the name only."""

_QUICK = ("jpeg75", "half-size", "chain", "bilateral", "vae", "ldm-0.1")
_STANDARD = (
    *_QUICK,
    "adverse-cleaner",
    "resize-only",
    "diffpure-100-quick",
    "gridpure-quick",
    "impress-lite-quick",
    "noisy-upscaling-quick",
)
_FULL = (*_STANDARD, *(name for name in PURIFIERS if name not in _STANDARD))

SUITES: Mapping[str, tuple[str, ...]] = MappingProxyType({"quick": _QUICK, "standard": _STANDARD, "full": _FULL})
"""Names by suite, each holding the one before: "quick" for every shard, "full" for everything there is."""


def check_purifiers(names: Iterable[str], models: Mapping[ModelKind, str]) -> None:
    """Raises UserError for an unknown purifier, and ModelMissing for one whose checkpoint is not given."""
    attacker = AttackModels(models)
    for name in names:
        if name not in PURIFIERS:
            raise UserError(f"no purifier named {name!r}; `fixative attack list` shows what there is")
        kind = PURIFIERS[name].missing(attacker)
        if kind is not None:
            raise ModelMissing(kind)
