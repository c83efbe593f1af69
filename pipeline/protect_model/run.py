"""Runs the protection of a model, with checkpoints, and writes the result."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from pipeline.errors import PipelineError, UserError
from pipeline.protect_model.plan import RUN, ModelPlan
from pipeline.protect_model.publish import publish
from pipeline.storage import json_bytes
from protectors.diffusion import DiffusionModel, load_model
from protectors.model_files import read_json
from protectors.pgd import Progress
from protectors.protected_weights import NotFiniteError
from protectors.reference.checkpoint import CheckpointConflict


def protect_model(plan: ModelPlan, progress: Progress | None = None) -> None:
    """Protects the model and writes the folder; goes on from the last checkpoint. A finished one costs nothing.

    Args:
        plan: what to do.
        progress: called with (updates done, updates in all), only for updates made now.

    Raises:
        UserError: the checkpoints were made on an unlike machine.
        PipelineError: the training broke down, or a folder cannot be written.
    """
    if not plan.finished:
        work = plan.job.work_folder
        _begin(work, plan)
        model = _load(plan)
        try:
            protected = plan.method(plan.config, model).protect(
                plan.concepts,
                seed=plan.job.seed,
                progress=progress,
                checkpoint=work / "checkpoint",
                checkpoint_every=plan.job.checkpoint_every,
            )
        except CheckpointConflict as error:
            # The plan has compared all else; what is left is how images of the class were drawn.
            raise UserError(
                f"{work} was begun where numbers come out otherwise (another processor or GPU, another number of "
                "threads): go on there, or remove it and begin again"
            ) from error
        except NotFiniteError as error:
            raise PipelineError(f"{error}. For another rate remove {work}, or choose another --work") from error
        publish(plan, protected, model)
    _clean(plan.job.work_folder)


def unet_bytes(plan: ModelPlan) -> int:
    """Of the UNet in float32, from its configuration alone."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(read_json(plan.folder / "unet" / "config.json"))
    return 4 * sum(int(weight.numel()) for weight in unet.parameters())


def seconds_for(plan: ModelPlan) -> float:
    """About how long all of it takes, from two updates with one step of the attacker each, on one image.

    Loads the model. Writes nothing.
    """
    model = _load(plan)
    first = plan.concepts[0]
    image = first.images[:1]
    concept = replace(first, images=image, positives=torch.zeros(1, *model.latent_shape(image)))
    short = {"inner_steps": 1} if plan.inner_steps else {}
    config = plan.config.replace(steps=2, class_images=1, **short)
    times = [time.monotonic()]
    plan.method(config, model).protect([concept], seed=0, progress=lambda done, total: times.append(time.monotonic()))
    update = times[2] - times[1]
    # The first span has the drawing of one class image too, which all other images of the class cost again.
    drawing = max(0.0, times[1] - times[0] - update)
    drawn = sum(plan.config.class_images + len(concept.images) for concept in plan.concepts)
    return drawn * drawing + plan.updates * max(1, plan.inner_steps) * update


def _load(plan: ModelPlan) -> DiffusionModel:
    from diffusers.utils import logging
    from transformers.utils import logging as transformers_logging

    for library in (logging, transformers_logging):
        library.disable_progress_bar()  # theirs would tear those of the command apart
    return load_model(str(plan.folder), device=plan.job.device)


def _begin(work: Path, plan: ModelPlan) -> None:
    """Marks the folder as this run's."""
    try:
        work.mkdir(parents=True, exist_ok=True)
        part = work / f"{RUN}.part"
        part.write_bytes(json_bytes(plan.run_facts()))
        os.replace(part, work / RUN)
    except OSError as error:
        raise PipelineError(f"{work} cannot be written: {error}") from error


def _clean(work: Path) -> None:
    """Removes what runs left there, and the folder if there is nothing else in it."""
    shutil.rmtree(work / "checkpoint", ignore_errors=True)
    (work / RUN).unlink(missing_ok=True)
    with suppress(OSError):  # other files are there, or it is gone
        work.rmdir()
