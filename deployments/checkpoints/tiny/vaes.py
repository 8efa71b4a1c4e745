"""Tiny VAEs: the published structure and latent channels, with small widths."""

from typing import Any

from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
)

_NUM_LEVELS = 4


def build_image_vae(
    latent_channels: int,
    scaling_factor: float,
    shift_factor: float | None = None,
    use_quant_conv: bool = False,
) -> AutoencoderKL:
    """A VAE of 4 levels: `[B, 3, 8h, 8w]` pixels, `[B, latent_channels, h, w]` latents."""
    return AutoencoderKL(
        sample_size=64,
        block_out_channels=(8,) * _NUM_LEVELS,
        down_block_types=("DownEncoderBlock2D",) * _NUM_LEVELS,
        up_block_types=("UpDecoderBlock2D",) * _NUM_LEVELS,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=latent_channels,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        use_quant_conv=use_quant_conv,
        use_post_quant_conv=use_quant_conv,
    )


def build_flux_vae() -> AutoencoderKL:
    """FLUX.1's VAE: 16 channels, shifted."""
    return build_image_vae(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159)


def build_sd_vae() -> AutoencoderKL:
    """Stable Diffusion's VAE, which many models use: 4 channels, not shifted."""
    return build_image_vae(latent_channels=4, scaling_factor=0.18215)


def build_flux2_vae() -> AutoencoderKLFlux2:
    """FLUX.2's VAE: 16 channels, packed by 2 x 2 and normalised by buffers that the pipeline reads."""
    vae = AutoencoderKLFlux2(
        block_out_channels=(8,) * _NUM_LEVELS,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=16,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    return vae


def build_qwen_vae() -> AutoencoderKLQwenImage:
    """Qwen-Image's VAE: like Wan's, for single frames."""
    return AutoencoderKLQwenImage(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)


def build_wan_vae(**changes: Any) -> AutoencoderKLWan:
    """Wan's VAE: 16 channels; one latent per 4 frames and 8 x 8 pixels. changes: other config values."""
    config = {"base_dim": 8, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1} | changes
    return AutoencoderKLWan(**config)


def build_wan22_vae() -> AutoencoderKLWan:
    """Wan 2.2's VAE: 48 channels; one latent per 4 frames and 16 x 16 pixels."""
    channels = 48
    return build_wan_vae(
        z_dim=channels,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        latents_mean=[0.1] * channels,
        latents_std=[1.5] * channels,
    )


def build_hunyuan_video_vae() -> AutoencoderKLHunyuanVideo:
    """HunyuanVideo's VAE: 16 channels; one latent per 4 frames and 8 x 8 pixels."""
    return AutoencoderKLHunyuanVideo(block_out_channels=(8,) * _NUM_LEVELS, layers_per_block=1, norm_num_groups=4)


def build_dc_vae(latent_channels: int) -> AutoencoderDC:
    """A deep-compression VAE: one latent per 32 x 32 pixels."""
    num_levels = 6
    return AutoencoderDC(
        latent_channels=latent_channels,
        attention_head_dim=4,
        encoder_block_out_channels=(8,) * num_levels,
        decoder_block_out_channels=(8,) * num_levels,
        encoder_layers_per_block=(1,) * num_levels,
        decoder_layers_per_block=(1,) * num_levels,
        encoder_qkv_multiscales=((),) * num_levels,
        decoder_qkv_multiscales=((),) * num_levels,
        scaling_factor=0.41407,
    )
