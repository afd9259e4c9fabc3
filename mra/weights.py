"""Weights from elsewhere, loaded strictly: BERT and vision transformers, for train.py's `--bert` and `--vit`.

Every tensor of a file is used or dropped by name, every shape must agree, and no pickle is executed. A foreign
file becomes tensors under our names, then goes through `checkpoint.restore_weights` like one of ours.
Before: checkpoint.py. After: released.py, which reads the released MRA checkpoints in the same way.
"""

import json
import math
import re
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from mra import checkpoint
from mra.config import ModelConfig, UserError
from mra.data.tokenizer import VOCAB_FILE, Tokenizer
from mra.retriever import Retriever

# Ours: theirs, one below the other where ours are one tensor.
BERT_BLOCK = {
    "attention.to_query": ("attention.self.query",),
    "attention.to_memory": ("attention.self.key", "attention.self.value"),
    "attention.to_out": ("attention.output.dense",), "attention_norm": ("attention.output.LayerNorm",),
    "mlp.0": ("intermediate.dense",), "mlp.2": ("output.dense",), "mlp_norm": ("output.LayerNorm",),
}
CROSS = {name.replace("attention", "cross"): tuple(part.replace("attention", "crossattention") for part in parts)
         for name, parts in BERT_BLOCK.items() if name.startswith("attention")}
VIT_BLOCK = BERT_BLOCK | {
    "attention.to_query": ("attention.attention.query",),
    "attention.to_memory": ("attention.attention.key", "attention.attention.value"),
    "attention_norm": ("layernorm_before",), "mlp_norm": ("layernorm_after",),
}
USUAL_HEADS = {768: 12, 1024: 16, 1280: 16}      # BERT and ViT, base and large; torchvision's vit_h_14
# Patterns and what to put in their place.
BERT_NAMES = ((r"^(text_encoder\.)?(bert\.)?", ""), (r"LayerNorm\.gamma$", "LayerNorm.weight"),
              (r"LayerNorm\.beta$", "LayerNorm.bias"))
BERT_DROPPED = (r"pooler\.", r"cls\.seq_relationship\.", r"cls\.predictions\.decoder\.", r"embeddings\.position_ids$")
VIT_NAMES = (    # torchvision's into Hugging Face's
    (r"^vit\.", ""), (r"^encoder\.layers\.encoder_layer_", "encoder.layer."), (r"^encoder\.ln\.", "layernorm."),
    (r"^conv_proj\.", "embeddings.patch_embeddings.projection."), (r"^class_token$", "embeddings.cls_token"),
    (r"^encoder\.pos_embedding$", "embeddings.position_embeddings"), (r"\.ln_1\.", ".layernorm_before."),
    (r"\.ln_2\.", ".layernorm_after."), (r"\.self_attention\.out_proj\.", ".attention.output.dense."),
    (r"\.mlp\.(linear_1|0)\.", ".intermediate.dense."), (r"\.mlp\.(linear_2|3)\.", ".output.dense."))
VIT_DROPPED = (r"pooler\.", r"classifier\.", r"heads\.head\.")


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of weights; a .pth or .bin may hold them under "model". Raises UserError for all else."""
    if not path.is_file():
        raise UserError(f"{path}: no such file of weights.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:      # broken files raise almost every type
        raise UserError(f"{path} cannot be read as weights: it is broken, or holds more than tensors "
                        f"({type(error).__name__}).") from error
    found = found.get("model", found) if isinstance(found, dict) else None
    if not isinstance(found, dict) or not all(isinstance(name, str) and isinstance(tensor, Tensor)
                                              for name, tensor in found.items()):
        raise UserError(f"{path} cannot be read as weights: it is no table of tensors.")
    return dict(found)


def renamed(name: str, rules: Iterable[tuple[str, str]]) -> str:
    """A name after all the rules."""
    for pattern, put in rules:
        name = re.sub(pattern, put, name)
    return name


class Source(AbstractContextManager):
    """The tensors of a file under the names that `rules` give them, each to be taken once or `dropped` by a pattern.

    To be used in a `with` statement, whose end raises UserError for tensors left over or that do not fit together.
    """

    def __init__(self, path: Path, rules: Iterable[tuple[str, str]], dropped: Iterable[str]):
        self.path, self.dropped = path, re.compile("|".join(dropped))
        self.left = {}
        for name, tensor in read(path).items():
            if self.left.setdefault(renamed(name, rules), tensor) is not tensor:
                raise UserError(f"{path}: {name} is there twice, once under another name.")

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, RuntimeError | ValueError | IndexError | ArithmeticError):
            raise UserError(f"{self.path}: the shapes of its tensors do not fit together.") from error
        over = sorted(name for name in self.left if not self.dropped.match(name))
        if over and not error:
            raise UserError(f"{self.path}: there is no place for {over[0]}, one of {len(over)} unknown tensors.")

    def shape(self, name: str) -> torch.Size:
        """The shape of a tensor. Raises UserError where it is missing."""
        if name not in self.left:
            raise UserError(f"{self.path}: {name} is missing, so these are not the weights they should be.")
        return self.left[name].shape

    def take(self, *names: str) -> Tensor:
        """One tensor, or several of the same shape, one below the other."""
        if len({self.shape(name) for name in names}) > 1:
            raise ValueError(f"the shapes of {names} differ")
        parts = [self.left.pop(name) for name in names]
        if not all(part.isfinite().all() for part in parts):
            raise UserError(f"{self.path}: {names[0]} holds values that are not finite.")
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def layers(self, ours: str, theirs: str, table: dict[str, tuple[str, ...]]) -> dict[str, Tensor]:
        """Weights and biases of the modules in a table, each module's name behind a prefix."""
        return {f"{ours}.{name}.{kind}": self.take(*(f"{theirs}.{part}.{kind}" for part in parts))
                for name, parts in table.items() for kind in ("weight", "bias")}

    def depth(self) -> int:
        """How many layers there are: one more than the largest number in a name."""
        numbers = re.findall(r"^encoder\.layer\.(\d+)\.", "\n".join(self.left), re.MULTILINE)
        return 1 + max(map(int, numbers), default=-1)


def heads_of(path: Path, dim: int) -> int:
    """Attention heads, which no tensor shows: as config.json beside the weights says, or those usual for the width."""
    beside = path.with_name("config.json")
    with checkpoint.trusting(beside):
        said = json.loads(beside.read_text()) if beside.is_file() else {}
        said = said if said.get("hidden_size") == dim else {}       # it may be that of other weights
        heads = int(said.get("num_attention_heads", USUAL_HEADS.get(dim, 0)))
    if said.get("hidden_act", "gelu") != "gelu":
        raise UserError(f"{path}: its activation is {said['hidden_act']}; only gelu will do.")
    if heads < 1 or dim % heads:
        raise UserError(f"{path}: put its config.json beside it, which tells the number of attention heads.")
    return heads


# ---- BERT

def bert_tensors(source: Source, text_depth: int) -> dict[str, Tensor]:
    """Text encoder from BERT's first `text_depth` layers, fusion encoder from the rest, word head if there is one."""
    words = source.take("embeddings.word_embeddings.weight")
    positions, types = (source.take(f"embeddings.{kind}_embeddings.weight") for kind in ("position", "token_type"))
    if positions.shape[1:] != types.shape[1:]:
        raise ValueError("positions and types differ in width")
    tensors = {"text_encoder.words.weight": words,
               "text_encoder.positions.weight": positions + types[0]}        # every token is of type 0 here
    tensors |= source.layers("text_encoder", "embeddings", {"norm": ("LayerNorm",)})
    for i in range(source.depth()):
        ours = f"text_encoder.blocks.{i}" if i < text_depth else f"fusion_encoder.blocks.{i - text_depth}"
        tensors |= source.layers(ours, f"encoder.layer.{i}", BERT_BLOCK)
        if f"encoder.layer.{i}.crossattention.self.query.weight" in source.left:
            tensors |= source.layers(ours, f"encoder.layer.{i}", CROSS)
    if "cls.predictions.bias" in source.left:
        head = "cls.predictions.transform"
        tensors |= source.layers("word_head.transform", head, {"0": ("dense",), "2": ("LayerNorm",)})
        bias = tensors["word_head.decoder.bias"] = source.take("cls.predictions.bias")
        for kind, own in (("weight", words), ("bias", bias)):
            if not torch.equal(source.left.get(f"cls.predictions.decoder.{kind}", own), own):
                raise UserError(f"{source.path}: its word head is not tied to its word embeddings, or has two biases.")
    return tensors


def bert(path: Path, config: ModelConfig) -> tuple[dict[str, Tensor], ModelConfig]:
    """A Hugging Face BERT's tensors under our names, and the configuration with its sizes.

    Its layers, however many, are divided between text and fusion encoder as `config`'s are.
    """
    path = in_folder(path)
    with Source(path, BERT_NAMES, BERT_DROPPED) as source:
        vocab, dim = source.shape("embeddings.word_embeddings.weight")
        positions, _ = source.shape("embeddings.position_embeddings.weight")
        depth = source.depth()
        text_depth = depth * config.text_depth // (config.text_depth + config.fusion_depth)
        if not 0 < text_depth < depth:
            raise UserError(f"{path}: {depth} layers are too few for a text and a fusion encoder.")
        config = replace(config, text_dim=dim, text_depth=text_depth, fusion_depth=depth - text_depth,
                         text_heads=heads_of(path, dim), vocab=vocab, positions=positions,
                         max_tokens=min(config.max_tokens, positions))
        return bert_tensors(source, text_depth), config


def in_folder(path: Path, names: Iterable[str] = ("model.safetensors", "pytorch_model.bin")) -> Path:
    """`path`, or the first of these files in the folder `path`. Raises UserError for a folder without any."""
    found = next((path / name for name in names if (path / name).is_file()), path)
    if found.is_dir():
        raise UserError(f"{path} holds no weights: none of {', '.join(names)}.")
    return found


# ---- vision transformers

def vit(path: Path, config: ModelConfig) -> tuple[dict[str, Tensor], ModelConfig]:
    """A ViT of torchvision or Hugging Face under our names, and the configuration with its sizes; the image's stays.

    Position embeddings are interpolated to `config`'s image; the class token becomes one that the patches look at.
    """
    path = in_folder(path)
    with Source(path, VIT_NAMES, VIT_DROPPED) as source:
        dim, _, patch, _ = source.shape("embeddings.patch_embeddings.projection.weight")
        config = replace(config, patch=patch, image_dim=dim, image_depth=source.depth(), window=0, class_token=True,
                         image_heads=heads_of(path, dim))
        if not config.image_depth:
            raise UserError(f"{path}: it has no layers, so these are not the weights they should be.")
        if config.height % patch or config.width % patch:
            raise UserError(f"{path}: its patches of {patch} pixels do not tile an image of "
                            f"{config.height}x{config.width}; choose another --preset.")
        return vit_tensors(source, config), config


def vit_tensors(source: Source, config: ModelConfig) -> dict[str, Tensor]:
    """The image encoder of that configuration."""
    for name in [name for name in source.left if ".self_attention.in_proj_" in name]:     # torchvision's
        layer, kind = name.split(".self_attention.in_proj_")
        for part, tensor in zip(("query", "key", "value"), source.take(name).chunk(3)):
            source.left[f"{layer}.attention.attention.{part}.{kind}"] = tensor
    ours, positions = "image_encoder", source.take("embeddings.position_embeddings")      # (1, 1+N, D)
    side = math.isqrt(positions.shape[1] - 1)
    if side * side != positions.shape[1] - 1:
        raise UserError(f"{source.path}: {positions.shape[1] - 1} position embeddings are no square of patches.")
    token = source.take("embeddings.cls_token")
    if token.shape != positions[:, :1].shape:
        raise ValueError("class token and positions differ in width")
    tensors = {f"{ours}.positions": resized_grid(positions[:, 1:], (side, side), config.grid),
               f"{ours}.class_token": token + positions[:, :1]}
    tensors |= source.layers(ours, "embeddings", {"patches": ("patch_embeddings.projection",)})
    for i in range(config.image_depth):
        tensors |= source.layers(f"{ours}.blocks.{i}", f"encoder.layer.{i}", VIT_BLOCK)
    return tensors | {f"{ours}.norm.{kind}": source.take(f"layernorm.{kind}") for kind in ("weight", "bias")}


def resized_grid(positions: Tensor, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """Position embeddings (1, N, D) of a grid of rows and columns -> of another, bicubic."""
    if grid == to:
        return positions
    square = positions.unflatten(1, grid).permute(0, 3, 1, 2)                # (1, D, rows, columns)
    return F.interpolate(square, to, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)


def start(config: ModelConfig, bert_path: str, vit_path: str, vocab: str) -> tuple[Retriever, Tokenizer]:
    """A new retriever that starts from BERT, a vision transformer or both, as far as they go; the rest is random.

    The vocabulary is `vocab`, else the vocab.txt beside BERT, else the packaged one.
    """
    files = {}
    for path, kind in ((bert_path, bert), (vit_path, vit)):
        if path:
            files[path], config = kind(Path(path), config)
    tokenizer = (read_vocabulary(vocab, Path(bert_path), config.vocab) if bert_path
                 else Tokenizer.read(Path(vocab or VOCAB_FILE)))
    model = Retriever(replace(config, vocab=len(tokenizer)))
    for path, tensors in files.items():
        checkpoint.restore_weights(model, checkpoint.weights(model) | tensors, Path(path))
    return model, tokenizer


def read_vocabulary(vocab: str, weights: Path, size: int) -> Tokenizer:
    """The vocabulary `vocab`, else vocab.txt beside the weights. Raises UserError if it has not `size` pieces."""
    file = Path(vocab) if vocab else (weights if weights.is_dir() else weights.parent) / "vocab.txt"
    if not file.is_file():
        raise UserError(f"{weights} holds no vocabulary: put BERT's vocab.txt beside it, or give --vocab.")
    tokenizer = Tokenizer.read(file)
    if len(tokenizer) != size:
        raise UserError(f"{file} has {len(tokenizer)} pieces and {weights} {size}: they do not belong together.")
    return tokenizer
