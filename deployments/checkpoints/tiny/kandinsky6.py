"""A tiny Kandinsky 6."""

from diffusers import Kandinsky6TI2VAPipeline, Kandinsky6Transformer3DModel, MMAudioVAE, MMAudioVocoder

from deployments.checkpoints.tiny.earlier_images import build_kandinsky5_parts
from deployments.checkpoints.tiny.sizes import ROPE_AXES
from deployments.checkpoints.tiny.text import TEXT_WIDTH
from deployments.checkpoints.tiny.vaes import build_hunyuan_video_vae


def build_kandinsky6() -> Kandinsky6TI2VAPipeline:
    """Kandinsky 6: makes a video with sound from an image; text encoders of Kandinsky 5."""
    hop_length, mel_bins, audio_channels = 64, 8, 4
    parts = build_kandinsky5_parts(visual_cond=True)
    parts["transformer"] = Kandinsky6Transformer3DModel(
        in_visual_dim=16,
        out_visual_dim=16,
        in_text_dim=TEXT_WIDTH,
        in_text_dim2=TEXT_WIDTH,
        time_dim=64,
        model_dim=64,
        ff_dim=128,
        num_text_blocks=1,
        num_visual_blocks=3,
        axes_dims=ROPE_AXES,
        in_audio_dim=audio_channels,
        out_audio_dim=audio_channels,
        visual_token_type_num_embeddings=2,
    )
    return Kandinsky6TI2VAPipeline(
        **parts,
        vae=build_hunyuan_video_vae(),
        audio_vae=MMAudioVAE(
            mel_bins=mel_bins,
            latent_channels=audio_channels,
            hidden_channels=16,
            channel_multipliers=(1, 2),
            layers_per_block=1,
            sample_rate=16_000,
            n_fft=256,
            hop_length=hop_length,
        ),
        vocoder=MMAudioVocoder(
            num_mels=mel_bins,
            upsample_initial_channel=32,
            upsample_rates=(4, 4, 4),
            upsample_kernel_sizes=(8, 8, 8),
            resblock_kernel_sizes=(3,),
            resblock_dilation_sizes=((1, 3, 5),),
        ),
    )
