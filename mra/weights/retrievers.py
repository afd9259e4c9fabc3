"""Retrievers: made from a configuration, started from weights from elsewhere, or loaded from a checkpoint of any kind.

CLIP's files are Hugging Face's, open_clip's with OpenAI's names, and those of IRRA's code (arXiv 2303.12501). Tables of
positions are interpolated for images of another size. Read next: run/stages.py.
"""

import math
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from mra.config import PRESETS, ModelConfig, UserError
from mra.data.tokenizer import VOCAB_FILE, Tokenizer
from mra.retriever import Retriever
from mra.run import checkpoint
from mra.weights.clip import CausalTextEncoder, ClipRetriever, ClipTokenizer
from mra.weights.files import depth_of, fill, fit_positions, heads_of, named, read, read_vocabulary, resized_grid
from mra.weights.released import BinnedRetriever, SwinEncoder

# parts of a retriever that the files of BERT and ViT have or do not have; what neither has stays random
PARTS = (r"image_encoder\.", r"text_encoder\.|fusion_encoder\..*\.(attention|mlp)", r"fusion_encoder\..*\.cross",
         r"word_head\.")
UNTOLD = {"dataset": "", "seed": "unknown", "data_root": "real data"}     # of the training of a file from elsewhere


def make_retriever(config: ModelConfig) -> Retriever:
    """A retriever with random weights, with the parts of the released ones that its configuration asks for."""
    if config.clip:
        return ClipRetriever(config, text_encoder=CausalTextEncoder(config))
    image_encoder = SwinEncoder(config) if config.window else None
    kind = BinnedRetriever if config.bins else Retriever
    return kind(config, image_encoder)


def model_facts(model: Retriever, tokenizer: Tokenizer) -> dict:
    """The part of a checkpoint's facts that `load_retriever` needs."""
    facts = {"model": asdict(model.config), "vocab": tokenizer.pieces}
    if model.config.clip:
        facts["merges"] = tokenizer.merges
    return facts


# ---- weights of BERT and a vision transformer, or of CLIP

def start(config: ModelConfig, bert_path: str, vit_path: str, vocab: str,
          clip_path: str = "") -> tuple[Retriever, Tokenizer]:
    """A new retriever that starts from BERT, a vision transformer or both, or from CLIP; what they lack is random."""
    if clip_path:
        return read_clip(read(Path(clip_path)), config, Path(clip_path), vocab)
    found, tokenizer = {}, None
    if bert_path:
        found[bert_path], config = read_bert(Path(bert_path), config)
        tokenizer = read_vocabulary(Tokenizer, vocab, Path(bert_path), config.vocab)
    if vit_path:
        found[vit_path], config = read_vit(Path(vit_path), config)
    tokenizer = tokenizer or Tokenizer.read(Path(vocab or VOCAB_FILE))
    model = make_retriever(replace(config, vocab=len(tokenizer)))
    for path, tensors in found.items():
        fill(model, tensors, Path(path), PARTS)
    return model, tokenizer


def read_bert(path: Path, config: ModelConfig) -> tuple[dict[str, Tensor], ModelConfig]:
    """A Hugging Face BERT's tensors under our names, and `config` with its sizes."""
    tensors = named(read(path), path, "bert")
    depth = depth_of(tensors, "layers.")
    text_depth = depth * config.text_depth // (config.text_depth + config.fusion_depth)     # divided as ours are
    if not 0 < text_depth < depth:
        raise UserError(f"{path}: {depth} layers are too few for a text and a fusion encoder.")
    with checkpoint.trusting(path):
        tensors = divided(tensors, text_depth)
        vocab, dim = tensors["text_encoder.words.weight"].shape
        positions = len(tensors["text_encoder.positions.weight"])
    return tensors, replace(config, text_dim=dim, text_depth=text_depth, fusion_depth=depth - text_depth,
                            text_heads=heads_of(path, dim), vocab=vocab, positions=positions,
                            max_tokens=min(config.max_tokens, positions))


def divided(tensors: dict[str, Tensor], text_depth: int) -> dict[str, Tensor]:
    """BERT's tensors with the first `text_depth` layers in the text encoder, the others in the fusion encoder.

    Every token is of type 0 here, so the embedding of that type becomes part of the positions.
    """
    positions = tensors["text_encoder.positions.weight"]
    first = tensors.pop("types.weight")[0].view(positions.shape[1])          # of that width only
    tensors["text_encoder.positions.weight"] = positions + first
    for name in [name for name in tensors if name.startswith("layers.")]:
        _, number, rest = name.split(".", 2)
        part, at = "text_encoder", int(number)
        if at >= text_depth:
            part, at = "fusion_encoder", at - text_depth
        tensors[f"{part}.blocks.{at}.{rest}"] = tensors.pop(name)
    return tensors


def read_vit(path: Path, config: ModelConfig) -> tuple[dict[str, Tensor], ModelConfig]:
    """A ViT of torchvision or Hugging Face under our names, and `config` with its sizes, but for the image's."""
    tensors = named(read(path), path, "vit")
    with checkpoint.trusting(path):
        dim, _, patch, _ = tensors["image_encoder.patches.weight"].shape
        if config.height % patch or config.width % patch:
            raise UserError(f"{path}: its patches of {patch} pixels do not tile an image of "
                            f"{config.height}x{config.width}; choose another --preset.")
        config = replace(config, patch=patch, image_dim=dim, image_depth=depth_of(tensors, "image_encoder.blocks."),
                         image_heads=heads_of(path, dim), class_token=True)
        fit_positions(tensors, config.grid, "bicubic")
    return tensors, config


def read_clip(tensors: dict[str, Tensor], like: ModelConfig, path: Path, vocab: str) -> tuple[Retriever, ClipTokenizer]:
    """A retriever of the tensors of a CLIP file, for images of the size of `like`, and its vocabulary.

    Its fusion encoder is random. Raises UserError for tensors or a vocabulary that do not fit.
    """
    tensors = named(tensors, path, "clip", "clip text")
    with checkpoint.trusting(path):
        for name in ("image_projection", "text_projection"):
            if f"{name}.columns" in tensors:
                tensors[f"{name}.weight"] = tensors.pop(f"{name}.columns").T
        scale = tensors.pop("logit_scale", torch.tensor(50.0).log())         # IRRA's is fixed, and in no file
        tensors["temperature"] = (-scale.float()).exp()
        dim, _, patch, _ = tensors["image_encoder.patches.weight"].shape
        tokenizer = read_vocabulary(ClipTokenizer, vocab, path, len(tensors["text_encoder.words.weight"]))
        positions, text_dim = tensors["text_encoder.positions.weight"].shape
        config = replace(like, patch=patch, image_dim=dim, image_depth=depth_of(tensors, "image_encoder.blocks."),
                         image_heads=heads_of(path, dim, "vision_config", "quick_gelu"), text_dim=text_dim,
                         text_heads=heads_of(path, text_dim, "text_config", "quick_gelu"),
                         text_depth=depth_of(tensors, "text_encoder.blocks."), vocab=len(tokenizer),
                         positions=positions, max_tokens=positions, embed=len(tensors["image_projection.weight"]))
        fit_positions(tensors, config.grid, "bilinear")                      # as in IRRA's code
    model = make_retriever(config)
    fill(model, tensors, path, [r"(image|text)_(encoder|projection)\.|temperature$"])
    return model, tokenizer


# ---- checkpoints

def load_retriever(path: Path, device: torch.device, vocab: str = "") -> tuple[Retriever, Tokenizer, dict]:
    """The model, the tokenizer and the facts of a checkpoint: ours, a released one, a CLIP or one of IRRA's family.

    Its content shows which. All but ours have their vocabulary in `vocab`, or beside the file.
    """
    if (path / "best.safetensors").is_file():       # a folder of train.py
        path /= "best.safetensors"
    is_file = path.suffix == ".safetensors" and not path.is_dir()
    tensors, facts = checkpoint.load(path) if is_file else ({}, {})
    if not facts:
        model, tokenizer, facts = read_foreign(path, vocab)
    elif "evaluated" in facts:
        raise UserError(f"{path} only resumes its run: give {path.with_name('best.safetensors')}.")
    elif vocab:
        raise UserError(f"--vocab: {path} has a vocabulary of its own; leave the flag out.")
    else:
        model, tokenizer = read_own(tensors, facts, path)
    return model.to(device).eval(), tokenizer, facts


def read_own(tensors: dict[str, Tensor], facts: dict, path: Path) -> tuple[Retriever, Tokenizer]:
    """The retriever of a checkpoint of train.py."""
    with checkpoint.trusting(path):
        if facts["model"].get("clip"):
            tokenizer = ClipTokenizer(facts["merges"], path)
        else:
            tokenizer = Tokenizer(facts["vocab"], path)
        facts["model"].pop("released_regions", None)        # a field of older files, which only training read
        model = make_retriever(checkpoint.config_of(ModelConfig, facts["model"], tokenizer))
        checkpoint.restore_weights(model, tensors, path)
    return model, tokenizer


def read_foreign(path: Path, vocab: str) -> tuple[Retriever, Tokenizer, dict]:
    """The retriever of a file or folder from elsewhere, and the facts that a checkpoint of train.py would have."""
    tensors = read(path)
    if any(name.endswith("class_embedding") for name in tensors):
        model, tokenizer = read_clip(tensors, PRESETS["clip"], path, vocab)
        facts = {"train": UNTOLD | {"preset": "clip"}, "val": {}, "pretrained_on": "unknown pairs", "mirror": False}
    elif any(name.startswith("vision_encoder.") for name in tensors):
        model, facts = read_released(tensors, path)
        tokenizer = read_vocabulary(Tokenizer, vocab, path, model.config.vocab)
    else:
        raise UserError(f"{path} holds no checkpoint of train.py, no released MRA model and no CLIP.")
    return model, tokenizer, facts


def read_released(tensors: dict[str, Tensor], path: Path) -> tuple[Retriever, dict]:
    """The model of a released checkpoint's tensors, and the facts of a checkpoint of ours."""
    tensors = named(tensors, path, "released", "bert")
    with checkpoint.trusting(path):
        table = tensors["image_encoder.stages.0.0.attn.relative_position_bias_table"]
        preset = "swin" if len(table) == 15 ** 2 else "swin-224"             # windows of 8 or of 7 patches
        tensors = divided(tensors, PRESETS[preset].text_depth)
        config = replace(PRESETS[preset], vocab=len(tensors["text_encoder.words.weight"]))
        if "image_projection.weight" in tensors:        # the model for RSTPReid, which also re-ranks more candidates
            config = replace(config, bins=0, embed=len(tensors["image_projection.weight"]), rerank=1000)
    model = make_retriever(config)
    fill(model, tensors, path)
    train = UNTOLD | {"preset": preset, "dataset": "sda" if preset == "swin-224" else ""}
    return model, {"train": train, "val": {"weight": 0.0}, "pretrained_on": "sda"}     # ranked by matching logits alone


def resized(model: Retriever, like: ModelConfig) -> Retriever:
    """A released model for images of the size of `like` and with its windows; tables of positions are interpolated."""
    target = make_retriever(replace(model.config, height=like.height, width=like.width, window=like.window))
    tensors = checkpoint.weights(model)
    for name, own in checkpoint.weights(target).items():
        if name.endswith("relative_position_bias_table"):
            side = math.isqrt(len(own))
            tensors[name] = resized_grid(tensors[name], (side, side), "bicubic", corners=True)
    checkpoint.restore_weights(target, tensors, Path("The resized model"))
    return target
