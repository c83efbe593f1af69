"""Real diffusers pipelines of the attacker at tiny size, with random weights, as folders on disk."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    IFImg2ImgSuperResolutionPipeline,
    StableDiffusionUpscalePipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.pipelines.deepfloyd_if import IFWatermarker
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from pipeline.verify.attack_models import AttackModels, ModelKind
from tests.protectors.tiny import save_tiny_model, save_tokenizer

TILE = 32
_WIDTH = 16
_BLOCKS = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}


def save_attack_models(folder: Path) -> AttackModels:
    """Every kind that purifiers use: latent (stride 4), pixel (tiles of 32), upscaler, cascade."""
    torch.manual_seed(0)
    save_tiny_model(folder / "latent")
    save_pixel_model(folder / "pixel")
    _save_upscaler(folder / "upscaler")
    _save_cascade(folder / "cascade")
    kinds = (ModelKind.LATENT, ModelKind.PIXEL, ModelKind.UPSCALER, ModelKind.CASCADE)
    return AttackModels({kind: str(folder / kind) for kind in kinds})


def save_pixel_model(folder: Path) -> None:
    unet = UNet2DModel(
        sample_size=TILE,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        **_BLOCKS,
    )
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler(beta_start=1e-4, beta_end=0.02)).save_pretrained(str(folder))


def _save_upscaler(folder: Path) -> None:
    save_tokenizer(folder / "clip")
    text = CLIPTextConfig(
        vocab_size=190,
        hidden_size=_WIDTH,
        intermediate_size=_WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=188,
        eos_token_id=189,
        pad_token_id=189,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.08333,
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=7,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        cross_attention_dim=_WIDTH,
        num_class_embeds=1000,
        **_BLOCKS,
    )
    StableDiffusionUpscalePipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer.from_pretrained(str(folder / "clip")),
        unet=unet,
        low_res_scheduler=DDPMScheduler(),
        scheduler=DDIMScheduler(prediction_type="v_prediction", clip_sample=False),
        max_noise_level=350,
    ).save_pretrained(str(folder))


def _save_cascade(folder: Path) -> None:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    pieces += [(chr(code), -3.0) for code in range(33, 127)]
    text = T5Config(
        vocab_size=len(pieces), d_model=_WIDTH, d_kv=8, d_ff=_WIDTH, num_layers=1, num_heads=2, pad_token_id=0
    )
    unet = UNet2DConditionModel(
        sample_size=TILE,
        in_channels=6,
        out_channels=6,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        attention_head_dim=8,
        cross_attention_dim=_WIDTH,
        encoder_hid_dim=_WIDTH,
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        class_embed_type="timestep",
        resnet_time_scale_shift="scale_shift",
        **_BLOCKS,
    )
    IFImg2ImgSuperResolutionPipeline(
        tokenizer=T5Tokenizer(vocab=pieces, extra_ids=0),
        text_encoder=T5EncoderModel(text),
        unet=unet,
        scheduler=DDPMScheduler(variance_type="learned_range", beta_schedule="squaredcos_cap_v2"),
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        safety_checker=None,
        feature_extractor=CLIPImageProcessorPil(),
        watermarker=IFWatermarker(),
        requires_safety_checker=False,
    ).save_pretrained(str(folder))
