"""The sizes of the reference models: Stable Diffusion's layout with fewer channels."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """One size of the model. All sizes share factor 8 and Stable Diffusion's noise schedule."""

    # Pixels on a side that the denoiser is trained at; the autoencoder works at any multiple of 8.
    image_size: int = 128
    # Three halvings give the factor 8, so there are always four entries.
    # Few channels where pixels are many: half the cost of (32, 64, 128, 128) for the same work at the latents' scale.
    vae_channels: tuple[int, int, int, int] = (16, 32, 96, 192)
    # Stable Diffusion has 4, at 512 px. At 128 px one latent covers as much of a picture as 32 x 32 pixels there,
    # and the best linear code of 4 numbers per 8 x 8 block stops at 21.1 dB (8: 23.6 dB; held-out photos).
    latent_channels: int = 8
    unet_channels: tuple[int, ...] = (64, 128, 192)
    # Attention heads in the denoiser and in the text encoder; must divide every channel count with attention.
    heads: int = 4
    text_width: int = 128
    text_layers: int = 3
    text_length: int = 32
    vocabulary: int = 2048
    # Each must divide the channel counts of its model.
    vae_norm_groups: int = 4
    unet_norm_groups: int = 16
    # Side of the pixel-space model's tiles, and its channels per halving; attention at the coarsest only.
    tile_size: int = 64
    tile_channels: tuple[int, ...] = (32, 64, 96)
    tile_norm_groups: int = 8
    # Side of the embedder's input, and its channels per stage; it halves the side once more at its stem.
    embed_size: int = 64
    embed_channels: tuple[int, ...] = (32, 64, 128, 256)


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
    unet_norm_groups=8,
    tile_size=16,
    tile_channels=(8, 16),
    embed_size=32,
    embed_channels=(8, 16),
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
# DDPM, https://arxiv.org/abs/2006.11239: what the purifiers of the literature count their t in.
TILE_SCHEDULE = {
    "num_train_timesteps": TRAIN_STEPS,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
}
