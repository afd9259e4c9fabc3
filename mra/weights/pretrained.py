"""BERT of Hugging Face as text and fusion encoder, ViTs of torchvision and Hugging Face as image encoder.

BERT's first layers become the text encoder, the others the fusion encoder. Read next: released.py, retrievers.py.
"""

import math
import re
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mra.config import ModelConfig, UserError
from mra.data.tokenizer import Tokenizer
from mra.weights.files import fitting, heads_of, in_folder, named

MLP_RULES = (r"\.intermediate\.dense\.", ".mlp.0."), (r"\.output\.dense\.", ".mlp.2.")
BERT_RULES = (
    (r"^(text_encoder\.)?(bert\.)?", ""), (r"^(pooler|cls\.seq_relationship)\..*|^embeddings\.position_ids$", ""),
    (r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"),
    (r"^embeddings\.(word|position)_embeddings\.", r"text_encoder.\1s."),
    (r"^embeddings\.token_type_embeddings\.", "types."), (r"^embeddings\.LayerNorm\.", "text_encoder.norm."),
    (r"^cls\.predictions\.bias$", "word_head.decoder.bias"), (r"^cls\.predictions\.decoder\.", "tied."),
    (r"^cls\.predictions\.transform\.dense\.", "word_head.transform.0."),
    (r"^cls\.predictions\.transform\.LayerNorm\.", "word_head.transform.2."),
    (r"^encoder\.layer\.", "layers."), (r"\.crossattention\.", ".cross."),
    (r"\.self\.(query|key|value)\.", r".to_\1."), (r"\.(attention|cross)\.output\.dense\.", r".\1.to_out."),
    (r"\.(attention|cross)\.output\.LayerNorm\.", r".\1_norm."), (r"\.output\.LayerNorm\.", ".mlp_norm."), *MLP_RULES)
VIT_RULES = (       # names of torchvision, and of Hugging Face
    (r"^vit\.", ""), (r"^(heads\.head|pooler|classifier)\..*", ""),
    (r"^(conv_proj|embeddings\.patch_embeddings\.projection)\.", "patches."),
    (r"^(encoder\.pos_embedding|embeddings\.position_embeddings)$", "positions"),
    (r"^embeddings\.cls_token$", "class_token"), (r"^(encoder\.ln|layernorm)\.", "norm."),
    (r"^encoder\.(layers\.encoder_layer_|layer\.)", "blocks."),
    (r"\.(ln_1|layernorm_before)\.", ".attention_norm."), (r"\.(ln_2|layernorm_after)\.", ".mlp_norm."),
    (r"\.self_attention\.in_proj_", ".attention.all."), (r"\.self_attention\.out_proj\.", ".attention.to_out."),
    (r"\.attention\.attention\.", ".attention.to_"), (r"\.attention\.output\.dense\.", ".attention.to_out."),
    (r"\.mlp\.linear_1\.", ".mlp.0."), (r"\.mlp\.(linear_2|3)\.", ".mlp.2."), *MLP_RULES)


def read_bert(path: Path, config: ModelConfig) -> tuple[dict[str, Tensor], ModelConfig]:
    """A Hugging Face BERT's tensors under our names, and the configuration with its sizes.

    Its layers, however many, are divided between text and fusion encoder as `config`'s are.
    """
    path = in_folder(path)
    tensors = named(path, BERT_RULES)
    depth = len({name.split(".")[1] for name in tensors if name.startswith("layers.")})
    text_depth = depth * config.text_depth // (config.text_depth + config.fusion_depth)
    if not 0 < text_depth < depth:
        raise UserError(f"{path}: {depth} layers are too few for a text and a fusion encoder.")
    with fitting(path):
        tensors = divided(tensors, text_depth, path)
        vocab, dim = tensors["text_encoder.words.weight"].shape
        positions, _ = tensors["text_encoder.positions.weight"].shape
    return tensors, replace(config, text_dim=dim, text_depth=text_depth, fusion_depth=depth - text_depth,
                            text_heads=heads_of(path, dim), vocab=vocab, positions=positions,
                            max_tokens=min(config.max_tokens, positions))


def divided(tensors: dict[str, Tensor], text_depth: int, path: Path) -> dict[str, Tensor]:
    """BERT's tensors with the first `text_depth` layers in the text encoder, the others in the fusion encoder.

    Every token is of type 0 here, so the embedding of that type becomes part of the positions.
    """
    def layer(found: re.Match) -> str:
        number = int(found[1])
        if number < text_depth:
            return f"text_encoder.blocks.{number}."
        return f"fusion_encoder.blocks.{number - text_depth}."

    for copy, own in (("tied.weight", "text_encoder.words.weight"), ("tied.bias", "word_head.decoder.bias")):
        if copy in tensors and not torch.equal(tensors.pop(copy), tensors[own]):
            raise UserError(f"{path}: its word head is not tied to its word embeddings, or has two biases.")
    types, positions = tensors.pop("types.weight"), tensors["text_encoder.positions.weight"]
    if positions.shape[1:] != types.shape[1:]:
        raise ValueError("positions and types differ in width")
    tensors["text_encoder.positions.weight"] = positions + types[0]
    return {re.sub(r"^layers\.(\d+)\.", layer, name): tensor for name, tensor in tensors.items()}


def read_vit(path: Path, config: ModelConfig) -> tuple[dict[str, Tensor], ModelConfig]:
    """A ViT of torchvision or Hugging Face under our names, and the configuration with its sizes; the image's stays.

    Position embeddings are interpolated to `config`'s image; the class token becomes one that the patches look at.
    """
    path = in_folder(path)
    tensors = named(path, VIT_RULES)
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    if not depth:
        raise UserError(f"{path}: it has no layers, so these are not the weights they should be.")
    with fitting(path):
        dim, _, patch, _ = tensors["patches.weight"].shape
        if config.height % patch or config.width % patch:
            raise UserError(f"{path}: its patches of {patch} pixels do not tile an image of "
                            f"{config.height}x{config.width}; choose another --preset.")
        config = replace(config, patch=patch, image_dim=dim, image_depth=depth, window=0, class_token=True,
                         image_heads=heads_of(path, dim))
        for name in [name for name in tensors if ".attention.all." in name]:        # torchvision's
            query, *keys_values = tensors.pop(name).chunk(3)
            tensors[name.replace(".all.", ".to_query.")] = query
            tensors[name.replace(".all.", ".to_keys_values.")] = torch.cat(keys_values)
        positions, token = tensors["positions"], tensors["class_token"]
        side = math.isqrt(positions.shape[1] - 1)                            # positions (1, 1+N, D)
        if side * side != positions.shape[1] - 1:
            raise UserError(f"{path}: {positions.shape[1] - 1} position embeddings are no square of patches.")
        if token.shape != positions[:, :1].shape:
            raise ValueError("class token and positions differ in width")
        tensors["class_token"] = token + positions[:, :1]
        tensors["positions"] = resized_grid(positions[:, 1:], (side, side), config.grid)
    return {f"image_encoder.{name}": tensor for name, tensor in tensors.items()}, config


def resized_grid(positions: Tensor, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """Position embeddings (1, N, D) of a grid of rows and columns -> of another, bicubic."""
    if grid == to:
        return positions
    square = positions.unflatten(1, grid).permute(0, 3, 1, 2)                # (1, D, rows, columns)
    return F.interpolate(square, to, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)


def read_vocabulary(vocab: str, weights: Path, size: int) -> Tokenizer:
    """The vocabulary `vocab`, else vocab.txt beside the weights. Raises UserError if it has not `size` pieces."""
    file = Path(vocab) if vocab else (weights if weights.is_dir() else weights.parent) / "vocab.txt"
    if not file.is_file():
        raise UserError(f"{weights} holds no vocabulary: put BERT's vocab.txt beside it, or give --vocab.")
    tokenizer = Tokenizer.read(file)
    if len(tokenizer) != size:
        raise UserError(f"{file} has {len(tokenizer)} pieces and {weights} {size}: they do not belong together.")
    return tokenizer
