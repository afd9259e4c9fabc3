"""Stable Diffusion 1.5 as the base: weights in the folder layout of diffusers, under our names.

The modules are those of every base, `stable` in its configuration. The table says what theirs are called, so that every
tensor is used and every shape is checked. Before: sampling.py, mra/weights.py. After: adapt.py.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from mra import checkpoint
from mra.config import DiffusionConfig
from mra.data.tokenizer import ClipTokenizer
from mra.diffusion.noising import Schedule
from mra.diffusion.sampling import Diffusion
from mra.weights import Source, in_folder, renamed


def place(kind: str):
    """Module n of ours, three of which make a level, as theirs: level n // 3, and its number n % 3 there."""
    return lambda found: f"{found[1]}_blocks.{int(found[2]) // 3}.{kind}.{int(found[2]) % 3}."


# Patterns in our names, and theirs, one after another. [kv] stands for two tensors, keys and values, here in one.
ATTENTION = ((r"to_query", "to_q"), (r"to_memory", "to_[kv]"), (r"(attn\d|attentions\.\d)\.to_out", r"\1.to_out.0"))
BLOCK = ((r"\.modulation\.", ".time_emb_proj."), (r"\.skip\.", ".conv_shortcut."))
UNET = (
    (r"^encoder\.level\.0\.", "time_embedding.linear_1."), (r"^encoder\.level\.2\.", "time_embedding.linear_2."),
    (r"^encoder\.first\.", "conv_in."), (r"^last\.0\.", "conv_norm_out."), (r"^last\.2\.", "conv_out."),
    (r"^ups\.(\d+)\.1\.", r"up_blocks.\1.upsamplers.0.conv."),
    (r"^encoder\.middle\.(\d)\.block\.", r"mid_block.resnets.\1."),
    (r"^encoder\.middle\.0\.transformer\.", "mid_block.attentions.0."),
    (r"^encoder\.stages", "down"), (r"^stages", "up"),
    (r"^(down|up)\.(\d+)\.block\.", place("resnets")), (r"^(down|up)\.(\d+)\.transformer\.", place("attentions")),
    (r"^(down)\.(\d+)\.(?=weight|bias)", place("downsamplers")), (r"(downsamplers)\.2\.", r"\1.0.conv."),
    (r"(attentions\.\d)\.to_in\.", r"\1.proj_in."), (r"(attentions\.\d)\.to_out\.", r"\1.proj_out."),
    (r"\.self_norm\.", ".transformer_blocks.0.norm1."), (r"\.attention\.", ".transformer_blocks.0.attn1."),
    (r"\.cross_norm\.", ".transformer_blocks.0.norm2."), (r"\.cross\.", ".transformer_blocks.0.attn2."),
    (r"\.mlp_norm\.", ".transformer_blocks.0.norm3."), (r"\.mlp\.to_hidden\.", ".transformer_blocks.0.ff.net.0.proj."),
    (r"\.mlp\.to_out\.", ".transformer_blocks.0.ff.net.2."), *BLOCK, *ATTENTION)
VAE = (
    (r"^encoder\.0\.", "encoder.conv_in."), (r"^encoder\.1\.(\d)\.3\.", r"encoder.down_blocks.\1.downsamplers.0.conv."),
    (r"^encoder\.1\.(\d)\.(\d)\.", r"encoder.down_blocks.\1.resnets.\2."),
    (r"^encoder\.3\.0\.", "encoder.conv_norm_out."), (r"^encoder\.3\.2\.", "encoder.conv_out."),
    (r"^encoder\.4\.", "quant_conv."), (r"^decoder\.0\.", "post_quant_conv."), (r"^decoder\.1\.", "decoder.conv_in."),
    (r"^decoder\.3\.(\d)\.3\.1\.", r"decoder.up_blocks.\1.upsamplers.0.conv."),
    (r"^decoder\.3\.(\d)\.(\d)\.", r"decoder.up_blocks.\1.resnets.\2."),
    (r"^decoder\.4\.0\.", "decoder.conv_norm_out."), (r"^decoder\.4\.2\.", "decoder.conv_out."),
    (r"coder\.2\.([02])\.", lambda found: f"coder.mid_block.resnets.{int(found[1]) // 2}."),
    (r"coder\.2\.1\.norm\.", "coder.mid_block.attentions.0.group_norm."),
    (r"coder\.2\.1\.attention\.", "coder.mid_block.attentions.0."), *BLOCK, *ATTENTION)
TEXT = (
    (r"^words\.", "embeddings.token_embedding."), (r"^positions\.", "embeddings.position_embedding."),
    (r"^norm\.", "final_layer_norm."), (r"^blocks\.", "encoder.layers."), (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.2\.", ".mlp.fc2."), (r"\.attention_norm\.", ".layer_norm1."), (r"\.mlp_norm\.", ".layer_norm2."),
    (r"\.attention\.", ".self_attn."), (r"to_query", "q_proj"), (r"to_memory", "[kv]_proj"), (r"to_out", "out_proj"))
# What older files call the same, and what there is no use for.
OLDER = ((r"^text_model\.", ""), (r"\.query\.", ".to_q."), (r"\.key\.", ".to_k."), (r"\.value\.", ".to_v."),
         (r"\.proj_attn\.", ".to_out.0."))
DROPPED = (r"embeddings\.position_ids$",)
FILES = [f"{stem}{kind}" for kind in (".safetensors", ".fp16.safetensors", ".bin")
         for stem in ("diffusion_pytorch_model", "model", "pytorch_model")]


def read_stable(folder: Path, size: DiffusionConfig, zero_snr: bool = False) -> Diffusion:
    """The base in a folder with unet/, vae/, text_encoder/ and tokenizer/. Raises UserError for what does not fit."""
    tokenizer = ClipTokenizer(Path(folder) / "tokenizer")
    with torch.device("meta"):
        base = Diffusion(replace(size, vocab=len(tokenizer)), tokenizer)
    base.to_empty(device="cpu").schedule = Schedule.scaled_linear(zero_snr)
    unet = {name: part for name, part in base.denoiser.named_children() if name != "text_encoder"}
    for model, part, names in ((nn.ModuleDict(unet), "unet", UNET), (base.autoencoder, "vae", VAE),
                               (base.denoiser.text_encoder, "text_encoder", TEXT)):
        path = in_folder(Path(folder) / part, FILES)
        with Source(path, OLDER, DROPPED) as source:
            own = {name: source.take(*theirs(name, names)) for name in checkpoint.weights(model)}
        checkpoint.restore_weights(model, own, path)
    return base


def theirs(name: str, names: tuple) -> list[str]:
    """What a tensor of ours is called in their file, or the two that it is made of."""
    found = renamed(name, names)
    return [found.replace("[kv]", kind) for kind in "kv"] if "[kv]" in found else [found]
