"""Runs the protection of a model, with checkpoints, and writes the result."""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from safetensors import SafetensorError

from pipeline.errors import PipelineError, UserError
from pipeline.protect_model.fetch import is_far
from pipeline.protect_model.lock import Say, silent
from pipeline.protect_model.plan import ModelPlan, is_finished
from pipeline.protect_model.publish import publish, sweep
from pipeline.protect_model.work import Work, is_left, opened
from pipeline.storage import check_conditional_writes
from protectors.diffusion import DiffusionModel, load_model
from protectors.model_files import read_json
from protectors.pgd import Progress
from protectors.protected_weights import NotFiniteError
from protectors.reference.checkpoint import CheckpointConflict


def protect_model(plan: ModelPlan, progress: Progress | None = None, say: Say = silent) -> None:
    """Protects the model and writes the folder; goes on from the last checkpoint. A finished one costs nothing.

    Args:
        plan: what to do.
        progress: called with (updates done, updates in all), only for updates made now.
        say: told when this has to wait for a run that may be dead.

    Raises:
        UserError: another run is at it, or the checkpoints were made on an unlike machine.
        PipelineError: the training broke down, the device has too little memory, or a folder cannot be written.
    """
    sweep(plan.job.out_store())
    if plan.finished and not is_left(plan.job):
        return
    for url, store in ((plan.job.out, plan.job.out_store()), (plan.job.work_url, plan.job.work_store())):
        if is_far(url):
            check_conditional_writes(store)  # hours before the first of them
    with opened(plan.job, say) as work:
        # Asked again: the run that this one waited for may have finished it.
        if not is_finished(plan.job, plan.identity):
            work.begin(plan.run_facts())
            _train(plan, work, progress)
        work.clean()


def _train(plan: ModelPlan, work: Work, progress: Progress | None) -> None:
    def done(updates: int, total: int) -> None:
        work.keep()
        if progress is not None:
            progress(updates, total)

    model, where = _load(plan), plan.job.work_name
    try:
        protected = plan.method(plan.config, model).protect(
            plan.concepts,
            seed=plan.job.seed,
            kept=plan.kept,
            progress=done,
            checkpoint=work.checkpoint,
            checkpoint_every=plan.job.checkpoint_every,
        )
    except CheckpointConflict as error:
        # The plan has compared all else; what is left is how images of the class were drawn.
        raise UserError(
            f"{where} was begun where numbers come out otherwise (another processor or GPU, another number of "
            "threads): go on there, or remove it and begin again"
        ) from error
    except NotFiniteError as error:
        raise PipelineError(f"{error}. For another rate remove {where}, or choose another --work") from error
    except torch.OutOfMemoryError as error:
        raise PipelineError(
            "the device has too little memory: free it and run the same command to go on, or begin again in another "
            "--out with --set gradient_checkpointing=true, and --set bf16=true"
        ) from error
    except (OSError, SafetensorError) as error:
        raise PipelineError(
            f"checkpoints in {where} cannot be written or read: {error}. The last one stays: mend it and run the same "
            "command to go on; if it is damaged, remove the folder and begin again"
        ) from error
    publish(plan, protected, model, work)


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
    if getattr(plan.config, "kept_images", 0):
        short["kept_images"] = 1
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
