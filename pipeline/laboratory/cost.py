"""What one step of a protection and one personalization cost on this machine."""

from __future__ import annotations

import statistics
import time
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from pipeline.laboratory.figures import Figure
from pipeline.verify.attack_models import load_pipeline
from pipeline.verify.customizers.dreambooth import DreamBooth
from protectors.advdm import AdvDM
from protectors.diffusion import load_model

MODEL = "nano-sd"


def advdm_step(model: Path, images: Tensor, steps: int) -> Figure:
    """Median wall time of one AdvDM step; only the machine's load can make it longer, so read it on an idle one."""
    protector = AdvDM(AdvDM.presets["paper"].replace(steps=steps, eval_draws=1), load_model(str(model)))
    marks = [time.perf_counter()]
    protector.protect(images, seeds=range(len(images)), progress=lambda done, total: marks.append(time.perf_counter()))
    durations = [after - before for before, after in pairwise(marks[1:])]
    sample = f"{len(images)} images of {images.shape[-1]} px, {len(durations)} steps, {torch.get_num_threads()} threads"
    value = statistics.median(durations)
    return Figure(model=MODEL, name="one AdvDM step, s", value=value, sample=sample, at_most=0.6)


def dreambooth(model: Path, images: Tensor, class_word: str, attack: DreamBooth) -> Figure:
    """Wall time of one personalization, class images included."""
    base = load_pipeline(model)
    since = time.perf_counter()
    attack.customize(base, images, class_word, seed=0)
    value = time.perf_counter() - since
    sample = f"{len(images)} photos, {attack.steps} updates, {torch.get_num_threads()} threads"
    return Figure(model=MODEL, name="one DreamBooth personalization, s", value=value, sample=sample, at_most=180.0)
