"""The autoencoder and the transformer of `shapes`, untrained: FLUX's own classes, small."""

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from deployments.training.shapes.text import TEXT_WIDTH

LATENT_CHANNELS = 16
VAE_FACTOR = 8
"""Pixels per latent position."""
PACKED_CHANNELS = 4 * LATENT_CHANNELS
"""FLUX packs 2 x 2 latent positions into one token."""

_NUM_HEADS = 4
_HEAD_DIM = 32
_ROPE_AXES = (8, 12, 12)
_NUM_BLOCKS = 3


def build_autoencoder() -> AutoencoderKL:
    """`[B, 3, 8h, 8w]` pixels in -1 to 1, `[B, 16, h, w]` latents. No attention: cost is linear in pixels.

    One group per norm, so that a uniform image keeps the differences between its channels, which are its colour.
    """
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=1,
        latent_channels=LATENT_CHANNELS,
        sample_size=128,
        scaling_factor=1.0,
        shift_factor=0.0,
        force_upcast=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    _start_linear(vae)
    return vae


@torch.no_grad()
def _start_linear(vae: AutoencoderKL) -> None:
    """Initialises residual branches and biases to zero, so that colours are learnt within a hundred steps.

    Torch's defaults shrink the signal layer by layer until the biases dominate it. The logarithm of the
    posterior's variance begins at -5, which is almost without noise.
    """
    for module in vae.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.get_parameter("bias"))
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)
    vae.encoder.conv_out.weight[LATENT_CHANNELS:] = 0
    vae.encoder.conv_out.bias[LATENT_CHANNELS:] = -5.0


def build_transformer() -> FluxTransformer2DModel:
    """3 double and 3 single blocks; each begins as the identity, as in DiT (adaLN-Zero, arXiv 2212.09748)."""
    transformer = FluxTransformer2DModel(
        in_channels=PACKED_CHANNELS,
        num_layers=_NUM_BLOCKS,
        num_single_layers=_NUM_BLOCKS,
        num_attention_heads=_NUM_HEADS,
        attention_head_dim=_HEAD_DIM,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=_ROPE_AXES,
    )
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and (".norm" in name or name.startswith(("norm_out", "proj_out"))):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)
    return transformer
