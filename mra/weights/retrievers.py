"""Any retriever: made from a configuration, started from BERT and a ViT, or loaded from a checkpoint, ours or released.

BERT's first layers become the text encoder, the others the fusion encoder. Tables of positions are interpolated for
images of another size. Read next: run/stages.py.
"""

import math
import re
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mra.config import PRESETS, ModelConfig, UserError
from mra.data.tokenizer import VOCAB_FILE, Tokenizer
from mra.retriever import Retriever
from mra.run import checkpoint
from mra.weights.files import fill, fitting, heads_of, in_folder, named
from mra.weights.released import ReleasedRetriever, resized_table

BERT_RULES = (
    (r"^(text_encoder\.)?(bert\.)?", ""), (r"^(pooler|cls\.seq_relationship)\..*|^embeddings\.position_ids$", ""),
    (r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"),
    (r"^embeddings\.(word|position)_embeddings\.", r"text_encoder.\1s."),
    (r"^embeddings\.token_type_embeddings\.", "types."), (r"^embeddings\.LayerNorm\.", "text_encoder.norm."),
    (r"^cls\.predictions\.bias$", "word_head.decoder.bias"), (r"^cls\.predictions\.decoder\.", "tied."),
    (r"^cls\.predictions\.transform\.dense\.", "word_head.transform.0."),
    (r"^cls\.predictions\.transform\.LayerNorm\.", "word_head.transform.2."),
    (r"^encoder\.layer\.", "layers."), (r"\.crossattention\.", ".cross."),
    (r"\.(attention|cross)\.output\.LayerNorm\.", r".\1_norm."), (r"\.output\.LayerNorm\.", ".mlp_norm."))
VIT_RULES = (       # names of torchvision, and of Hugging Face
    (r"^vit\.", ""), (r"^(heads\.head|pooler|classifier)\..*", ""),
    (r"^(conv_proj|embeddings\.patch_embeddings\.projection)\.", "patches."),
    (r"^(encoder\.pos_embedding|embeddings\.position_embeddings)$", "positions"),
    (r"^embeddings\.cls_token$", "class_token"), (r"^(encoder\.ln|layernorm)\.", "norm."),
    (r"^encoder\.(layers\.encoder_layer_|layer\.)", "blocks."), (r"\.mlp\.3\.", ".mlp.2."))
RELEASED_RULES = (
    (r".*\.(relative_position_index|attn_mask)$", ""),      # they follow from the window
    (r"^vision_encoder\.", "image_encoder."), (r"\.patch_embed\.proj\.", ".patches."),
    (r"\.patch_embed\.norm\.", ".patch_norm."), (r"\.layers\.(\d)\.blocks\.", r".stages.\1."),
    (r"\.layers\.(\d)\.downsample\.", r".merges.\1."), (r"\.mlp\.fc2\.", ".mlp.3."),
    (r"^vision_proj\.", "image_projection."), (r"^text_proj\.", "text_projection."), (r"^temp$", "temperature"),
    (r"^itm_head\.", "matching_head."), *BERT_RULES)
# parts of a retriever that the files of BERT and ViT have or do not have; what neither has stays random
PARTS = (r"image_encoder\.", r"text_encoder\.|fusion_encoder\..*\.(attention|mlp)", r"fusion_encoder\..*\.cross",
         r"word_head\.")


def make_retriever(config: ModelConfig) -> Retriever:
    """A retriever with random weights; of the released kind where its configuration says so."""
    released = config.window or config.bins or config.released_regions
    return ReleasedRetriever(config) if released else Retriever(config)


def model_facts(model: Retriever, tokenizer: Tokenizer) -> dict:
    """The part of a checkpoint's facts that `load_retriever` needs."""
    return {"model": asdict(model.config), "vocab": tokenizer.pieces}


# ---- weights of BERT and of a vision transformer

def start(config: ModelConfig, bert_path: str, vit_path: str, vocab: str) -> tuple[Retriever, Tokenizer]:
    """A new retriever that starts from BERT, a vision transformer or both, as far as they go; the rest is random.

    The vocabulary is `vocab`, else the vocab.txt beside BERT, else the packaged one.
    """
    files = {}
    for path, reader in ((bert_path, read_bert), (vit_path, read_vit)):
        if path:
            files[path], config = reader(Path(path), config)
    if bert_path:
        tokenizer = read_vocabulary(vocab, Path(bert_path), config.vocab)
    else:
        tokenizer = Tokenizer.read(Path(vocab or VOCAB_FILE))
    model = make_retriever(replace(config, vocab=len(tokenizer)))
    for path, tensors in files.items():
        fill(model, tensors, Path(path), PARTS)
    return model, tokenizer


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
    for copy, own in (("tied.weight", "text_encoder.words.weight"), ("tied.bias", "word_head.decoder.bias")):
        if copy in tensors and not torch.equal(tensors.pop(copy), tensors[own]):
            raise UserError(f"{path}: its word head is not tied to its word embeddings, or has two biases.")
    types, positions = tensors.pop("types.weight"), tensors["text_encoder.positions.weight"]
    tensors["text_encoder.positions.weight"] = positions + types[0].view(positions.shape[1])        # of that width only

    def block(layer: re.Match) -> str:
        number = int(layer[1])
        if number < text_depth:
            return f"text_encoder.blocks.{number}."
        return f"fusion_encoder.blocks.{number - text_depth}."

    return {re.sub(r"^layers\.(\d+)\.", block, name): tensor for name, tensor in tensors.items()}


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
        first, rest = tensors["positions"].tensor_split([1], 1)              # (1, 1, D), (1, N, D)
        side = math.isqrt(rest.shape[1])
        if side * side != rest.shape[1]:
            raise UserError(f"{path}: {rest.shape[1]} position embeddings are no square of patches.")
        tensors["class_token"] = tensors["class_token"].view_as(first) + first
        tensors["positions"] = resized_grid(rest, (side, side), config.grid)
    return {f"image_encoder.{name}": tensor for name, tensor in tensors.items()}, config


def read_vocabulary(vocab: str, weights: Path, size: int) -> Tokenizer:
    """The vocabulary `vocab`, else vocab.txt beside the weights. Raises UserError if it has not `size` pieces."""
    folder = weights if weights.is_dir() else weights.parent
    file = Path(vocab) if vocab else folder / "vocab.txt"
    if not file.is_file():
        raise UserError(f"{weights} holds no vocabulary: put BERT's vocab.txt beside it, or give --vocab.")
    tokenizer = Tokenizer.read(file)
    if len(tokenizer) != size:
        raise UserError(f"{file} has {len(tokenizer)} pieces and {weights} {size}: they do not belong together.")
    return tokenizer


# ---- checkpoints

def load_retriever(path: Path, device: torch.device, vocab: str = "") -> tuple[Retriever, Tokenizer, dict]:
    """The model, the tokenizer and the facts of a checkpoint, ours (.safetensors) or a released one.

    A released model's vocabulary is `vocab`, or the vocab.txt beside the file.
    """
    if path.suffix != ".safetensors":
        model, facts = read_released(path)
        return model.to(device).eval(), read_vocabulary(vocab, path, model.config.vocab), facts
    if vocab:
        raise UserError(f"--vocab: {path} has a vocabulary of its own; leave the flag out.")
    tensors, facts = checkpoint.load(path)
    with checkpoint.trusting(path):
        tokenizer = Tokenizer(facts["vocab"], path)
        config = checkpoint.config_of(ModelConfig, facts["model"], tokenizer)
        names = facts["pretrained_on"], *(facts["train"][name] for name in ("preset", "dataset", "data_root"))
        if not all(isinstance(name, str) for name in names):        # the scripts rely on these
            raise TypeError("there is something else in place of a name")
        if not 0 <= facts["val"].get("weight", 0.0) < float("inf"):
            raise ValueError(f"weight is {facts['val']['weight']}")
        model = checkpoint.build(lambda: make_retriever(config), tensors, path)
    return model.to(device).eval(), tokenizer, facts


def read_released(path: Path) -> tuple[ReleasedRetriever, dict]:
    """The model of a released checkpoint, and the facts of a checkpoint of ours: its clean score is the matching logit.

    The file holds a Swin, BERT's layers as text and fusion encoder, and the heads. Raises UserError for other files.
    """
    tensors = named(path, RELEASED_RULES)
    with fitting(path):
        rows, _ = tensors["image_encoder.stages.0.0.attn.relative_position_bias_table"].shape
        preset = {225: "swin", 169: "swin-224"}.get(rows)                    # windows of 8 or 7 patches
        if preset is None:
            raise UserError(f"{path}: {rows} relative positions; the released models' windows have 225 or 169.")
        tensors = divided(tensors, PRESETS[preset].text_depth, path)
        config = replace(PRESETS[preset], vocab=len(tensors["text_encoder.words.weight"]))
        if "image_projection.weight" in tensors:        # the model for RSTPReid, which also re-ranks more candidates
            config = replace(config, bins=0, embed=len(tensors["image_projection.weight"]), rerank=1000)
    model = ReleasedRetriever(config)
    fill(model, tensors, path)
    train = {"preset": preset, "dataset": "sda" if preset == "swin-224" else "", "seed": "unknown",
             "data_root": "real data"}
    return model, {"train": train, "val": {"weight": 0.0}, "pretrained_on": "sda"}


# ---- images of another size

def with_size(config: ModelConfig, like: ModelConfig) -> ModelConfig:
    """The configuration for images of the size of `like`, and its windows."""
    return replace(config, height=like.height, width=like.width, window=like.window)


def resized(model: Retriever, like: ModelConfig) -> Retriever:
    """The model for images of the size of `like` and with its windows; tables of positions are interpolated."""
    target, tensors = make_retriever(with_size(model.config, like)), checkpoint.weights(model)
    for name, own in checkpoint.weights(target).items():
        if name.endswith("relative_position_bias_table"):
            tensors[name] = resized_table(tensors[name], math.isqrt(len(own)))
        elif name == "image_encoder.positions":
            tensors[name] = resized_grid(tensors[name], model.config.grid, target.config.grid)
    checkpoint.restore_weights(target, tensors, Path("The resized model"))
    return target


def resized_grid(positions: Tensor, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """Position embeddings (1, N, D) of a grid of rows and columns -> of another, bicubic."""
    if grid == to:
        return positions
    square = positions.unflatten(1, grid).permute(0, 3, 1, 2)                # (1, D, rows, columns)
    return F.interpolate(square, to, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
