"""The released MRA checkpoints, number for number, and checkpoints of either kind for images of another size.

A released file holds a Swin-B, BERT's layers as text and fusion encoder, and the heads; it becomes one of the presets
`swin` (384x256) or `swin-224`. Fine-tuning at 384x256 what was pretrained at 224x224 interpolates the tables of
positions. Before: weights.py. After: train.py (`--init`), evaluate.py and adapt.py (`--checkpoint`).
"""

import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mra import checkpoint
from mra.config import PRESETS, ModelConfig, UserError
from mra.data.tokenizer import Tokenizer
from mra.retriever import Retriever
from mra.weights import BERT_DROPPED, BERT_NAMES, Source, bert_tensors, read_vocabulary, resized_grid

RELEASED_NAMES = (
    (r"^vision_encoder\.", "image_encoder."), (r"\.patch_embed\.proj\.", ".patches."),
    (r"\.patch_embed\.norm\.", ".patch_norm."), (r"\.layers\.(\d)\.blocks\.", r".stages.\1."),
    (r"\.layers\.(\d)\.downsample\.", r".merges.\1."), (r"\.mlp\.fc1\.", ".mlp.0."), (r"\.mlp\.fc2\.", ".mlp.3."),
    (r"^vision_proj\.", "image_projection."), (r"^text_proj\.", "text_projection."), (r"^temp$", "temperature"),
    (r"^itm_head\.", "matching_head."))
RELEASED_DROPPED = (r".*\.relative_position_index$", r".*\.attn_mask$")      # they follow from the window


def read_released(path: Path) -> tuple[dict[str, Tensor], ModelConfig, str]:
    """A released checkpoint's tensors under our names, its configuration, the preset nearest to it; else UserError."""
    with Source(path, RELEASED_NAMES + BERT_NAMES, RELEASED_DROPPED + BERT_DROPPED) as source:
        rows, _ = source.shape("image_encoder.stages.0.0.attn.relative_position_bias_table")
        preset = {225: "swin", 169: "swin-224"}.get(rows)                    # windows of 8 or 7 patches
        if preset is None:
            raise UserError(f"{path}: {rows} relative positions; the released models' windows have 225 or 169.")
        config = replace(PRESETS[preset], vocab=source.shape("embeddings.word_embeddings.weight")[0])
        if "image_projection.weight" in source.left:    # as for RSTPReid, which is also re-ranked further down
            config = replace(config, bins=0, embed=source.shape("image_projection.weight")[0], rerank=1000)
        tensors = bert_tensors(source, config.text_depth)
        tensors |= {name: source.take(name) for name in list(source.left) if not source.dropped.match(name)}
        return tensors, config, preset


def load_retriever(path: Path, device: torch.device, vocab: str = "") -> tuple[Retriever, Tokenizer, dict]:
    """A checkpoint's model, tokenizer and facts; a released one's vocabulary is `vocab`, or the vocab.txt beside it."""
    if path.suffix == ".safetensors":
        if vocab:
            raise UserError(f"--vocab: {path} has a vocabulary of its own; leave the flag out.")
        return checkpoint.load_retriever(path, device)
    tensors, config, preset = read_released(path)
    tokenizer = read_vocabulary(vocab, path, config.vocab)
    facts = {"train": {"preset": preset, "dataset": "sda" if preset == "swin-224" else "", "seed": "unknown",
                       "data_root": "real data"}, "val": {"weight": 0.0}, "pretrained_on": "sda"}
    model = checkpoint.build(lambda: Retriever(config), tensors, path)
    return model.to(device).eval(), tokenizer, facts


def with_size(config: ModelConfig, like: ModelConfig) -> ModelConfig:
    """The configuration for images of the size of `like`, and its windows."""
    return replace(config, height=like.height, width=like.width, window=like.window)


def resized(model: Retriever, like: ModelConfig) -> Retriever:
    """The model for images of another size, with the windows of `like`; its position tables are interpolated."""
    target, tensors = Retriever(with_size(model.config, like)), checkpoint.weights(model)
    for name, own in checkpoint.weights(target).items():
        if name.endswith("relative_position_bias_table"):
            tensors[name] = resized_table(tensors[name], math.isqrt(len(own)))
        elif name == "image_encoder.positions":
            tensors[name] = resized_grid(tensors[name], model.config.grid, target.config.grid)
    checkpoint.restore_weights(target, tensors, Path("The resized model"))
    return target


def resized_table(table: Tensor, to: int) -> Tensor:
    """Relative position biases ((2w-1)^2, heads) of windows of w patches -> (to^2, heads), as the released code does.

    Positions are spaced geometrically, near ones densely, so that the new table reaches as far as the old one
    (Swin's released fine-tuning code); between them runs the cubic spline with not-a-knot ends, both ways.
    """
    side = math.isqrt(len(table))
    if side == to:
        return table
    ratio = geometric_ratio(side // 2, to // 2)
    steps = torch.tensor([ratio ** i for i in range(side // 2)], dtype=torch.float64).cumsum(0)
    x = torch.cat([-steps.flip(0), steps.new_zeros(1), steps])               # (side,)
    at = torch.arange(-(to // 2), to // 2 + 1, dtype=torch.float64)          # (to,)

    def basis(points: Tensor) -> Tensor:    # of piecewise cubics with a knot at every x but the outer two at each end
        powers = [points ** power for power in range(4)]
        return torch.stack(powers + [(points - knot).clamp(min=0) ** 3 for knot in x[2:-2]], 1)
    spline = basis(at.clamp(x[0], x[-1])) @ torch.linalg.inv(basis(x))       # (to, side)
    square = table.detach().cpu().double().view(side, side, -1)
    return torch.einsum("ai,bj,ijh->abh", spline, spline, square).flatten(0, 1).to(table.dtype)


def geometric_ratio(terms: int, reach: int) -> float:
    """The ratio in 1.01 .. 1.5 with which that many terms, the first being 1, add up to `reach`; by bisection."""
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        low, high = (low, ratio) if sum(ratio ** i for i in range(terms)) > reach else (ratio, high)
    return ratio
