"""Writes tiny models as single files, with the tensor names of their authors, before diffusers renamed them."""

import re
from collections.abc import Mapping
from pathlib import Path

import gguf
import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]

_LAYERS_PER_BLOCK = 1
"""Number of layers in a block of the tiny UNet; a block's down- or upsampler counts as one more."""
_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_VAE = {
    "conv_norm_out": "norm_out",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_WAN = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    ".norm2.": ".norm3.",
    "attn2": "cross_attn",
    "attn1": "self_attn",
    ".to_out.0.": ".o.",
    ".to_q.": ".q.",
    ".to_k.": ".k.",
    ".to_v.": ".v.",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}


def write_sd15(folder: Path, file: Path) -> Path:
    """Writes UNet, VAE and text encoder of a Stable Diffusion 1.5 checkpoint into one file."""
    unet = read(folder / "unet")
    vae = read(folder / "vae")
    text = read(folder / "text_encoder")
    tensors = {f"model.diffusion_model.{_unet_name(name)}": tensor for name, tensor in unet.items()}
    tensors |= {f"first_stage_model.{_vae_name(name)}": _as_kernel(name, tensor) for name, tensor in vae.items()}
    prefix = "cond_stage_model.transformer.text_model."
    tensors |= {f"{prefix}{name.removeprefix('text_model.')}": tensor for name, tensor in text.items()}
    save_file(tensors, file)
    return file


def wan_tensors(folder: Path) -> Tensors:
    """Returns the tensors of Wan's denoiser under its authors' names."""
    return {_wan_name(name): tensor for name, tensor in read(folder / "transformer").items()}


def read(component: Path) -> Tensors:
    return {
        name: tensor
        for file in sorted(component.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def write_gguf(tensors: Mapping[str, torch.Tensor], file: Path) -> Path:
    """Writes matrices as Q8_0 (8 bits for each value, and a scale for each 32), other tensors as they are."""
    writer = gguf.GGUFWriter(file, "tiny")
    for name, tensor in tensors.items():
        values = tensor.float().numpy()
        if tensor.ndim == 2 and tensor.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _unet_name(name: str) -> str:
    if ".resnets." in name:
        for ours, theirs in _RESNET.items():
            name = name.replace(f".{ours}.", f".{theirs}.")
    for ours, theirs in _UNET.items():
        if name.startswith(f"{ours}."):
            return name.replace(ours, theirs, 1)
    side, block, kind, layer, rest = re.fullmatch(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.+)", name).groups()  # type: ignore[union-attr]
    index = int(block) * (_LAYERS_PER_BLOCK + 1)
    if kind == "downsamplers":
        return f"input_blocks.{1 + index + _LAYERS_PER_BLOCK}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{index + _LAYERS_PER_BLOCK}.1.{rest}"
    place = f"input_blocks.{1 + index + int(layer)}" if side == "down" else f"output_blocks.{index + int(layer)}"
    return f"{place}.{int(kind == 'attentions')}.{rest}"


def _vae_name(name: str) -> str:
    for ours, theirs in _VAE.items():
        name = re.sub(rf"(^|\.){re.escape(ours)}\.", rf"\g<1>{theirs}.", name)
    name = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{3 - int(m[1])}.block.{m[2]}", name)
    return re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample", name)


def _as_kernel(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Returns attention's matrices as kernels of 1 x 1 pixel, which they originally were."""
    return tensor[:, :, None, None].contiguous() if ".attentions." in name and tensor.ndim == 2 else tensor


def _wan_name(name: str) -> str:
    if not name.startswith("blocks."):
        name = re.sub("^scale_shift_table", "head.modulation", re.sub(r"^proj_out\.", "head.head.", name))
    name = name.replace("scale_shift_table", "modulation")
    for ours, theirs in _WAN.items():
        name = name.replace(ours, theirs)
    return name
