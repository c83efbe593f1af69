"""The sizes of the reference models: Stable Diffusion's layout with fewer channels."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """One size of the model. All sizes share factor 8, four latent channels and SD's noise schedule."""

    # Pixels on a side that the denoiser is trained at; the autoencoder works at any multiple of 8.
    image_size: int = 128
    # Three halvings give the factor 8, so there are always four entries.
    vae_channels: tuple[int, int, int, int] = (32, 64, 128, 128)
    unet_channels: tuple[int, ...] = (64, 96, 128)
    # Attention heads in the denoiser and in the text encoder; must divide every channel count with attention.
    heads: int = 4
    text_width: int = 128
    text_layers: int = 3
    text_length: int = 32
    vocabulary: int = 2048
    # Must divide every channel count above.
    norm_groups: int = 16


NANO = Geometry()
# For tests: the same shape of everything, trained in a second.
TINY = Geometry(
    image_size=32,
    vae_channels=(8, 8, 16, 16),
    unet_channels=(16, 16, 32),
    heads=2,
    text_width=32,
    text_layers=1,
    vocabulary=640,
    norm_groups=8,
)
GEOMETRIES = {"nano": NANO, "tiny": TINY}

# Stable Diffusion 1.x, as its scheduler_config.json has it.
TRAIN_STEPS = 1000
SCHEDULE = {
    "num_train_timesteps": TRAIN_STEPS,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
