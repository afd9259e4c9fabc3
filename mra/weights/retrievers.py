"""Any retriever: made from a configuration, started from foreign weights, or loaded from a checkpoint of any kind.

`resized` interpolates tables of positions, so that a checkpoint fits images of another size. Read next: run/stages.py.
"""

import math
from dataclasses import asdict, replace
from pathlib import Path

import torch

from mra.config import ModelConfig, UserError
from mra.data.tokenizer import VOCAB_FILE, Tokenizer
from mra.retriever import Retriever
from mra.run import checkpoint
from mra.weights.files import fill
from mra.weights.pretrained import read_bert, read_vit, read_vocabulary, resized_grid
from mra.weights.released import ReleasedRetriever, read_released, resized_table

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


def load_retriever(path: Path, device: torch.device, vocab: str = "") -> tuple[Retriever, Tokenizer, dict]:
    """The model, the tokenizer and the facts of a checkpoint, ours (.safetensors) or a released one.

    A released model's vocabulary is `vocab`, or the vocab.txt beside the file.
    """
    if path.suffix != ".safetensors":
        model, facts = read_released(path)
        tokenizer = read_vocabulary(vocab, path, model.config.vocab)
    elif vocab:
        raise UserError(f"--vocab: {path} has a vocabulary of its own; leave the flag out.")
    else:
        model, tokenizer, facts = load_own(path)
    return model.to(device).eval(), tokenizer, facts


def load_own(path: Path) -> tuple[Retriever, Tokenizer, dict]:
    """`load_retriever` for a file that train.py wrote."""
    tensors, facts = checkpoint.load(path)
    with checkpoint.trusting(path):
        tokenizer = Tokenizer(facts["vocab"], path)
        config = checkpoint.config_of(ModelConfig, facts["model"], tokenizer)
        train = facts["train"]      # what the scripts rely on
        for text in (train["preset"], train["dataset"], train["data_root"], facts["pretrained_on"]):
            if not isinstance(text, str):
                raise TypeError(f"{text!r} in place of a name")
        if not 0 <= facts["val"].get("weight", 0.0) < float("inf"):
            raise ValueError(f"weight is {facts['val']['weight']}")
        return checkpoint.build(lambda: make_retriever(config), tensors, path), tokenizer, facts


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
