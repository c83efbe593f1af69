"""Writes a trained text-to-image model as a diffusers folder."""

from pathlib import Path

from diffusers import PNDMScheduler, StableDiffusionPipeline

from protectors.reference.denoiser import SdTask
from protectors.reference.geometry import SCHEDULE
from protectors.reference.tokenizer import save_vocabulary
from protectors.reference.vae import load_vae


def save_pipeline(folder: Path, task: SdTask) -> None:
    """Completes a folder that holds `vae` to a pipeline, with averaged weights in float16.

    The autoencoder is taken from the folder and not from `task`: its decoder may have been trained on meanwhile.
    `task` holds float16 models afterwards.
    """
    scheduler = PNDMScheduler(
        **SCHEDULE, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1, prediction_type="epsilon"
    )
    scheduler.register_to_config(clip_sample=False)  # PNDM ignores it; DDIM made from this config must not clip
    with task.learner.averaged():
        pipeline = StableDiffusionPipeline(
            vae=load_vae(folder / "vae").half(),
            text_encoder=task.text_encoder.half(),
            tokenizer=task.tokenizer,
            unet=task.unet.half(),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.save_pretrained(folder, safe_serialization=True)
    save_vocabulary(task.tokenizer, folder / "tokenizer")
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes for the owner only; a package is read by everybody
