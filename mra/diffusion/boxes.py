"""A box for every phrase of a made image, from the denoiser's cross-attention (MRA section 2, annotation).

The paper runs an open-set detector on its images. Here the denoiser's cross-attention maps tell where it put a phrase:
they are read while it denoises the image from three levels around half-way. Adjectives attend to the whole person, so
the last word of a phrase, its noun, counts most. The map is weighted by where the source's boxes usually have the noun.
Read next: making.py.
"""

import math
import threading
from collections import defaultdict
from collections.abc import Iterable
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from mra.data.records import Box, Record
from mra.data.tokenizer import Tokenizer
from mra.diffusion.denoiser import Denoiser, DomainBranch, Prompt, SpatialTransformer, controlled
from mra.diffusion.noising import Schedule, q_sample

LEVELS = (0.35, 0.5, 0.65)      # noise levels of the attention maps, as shares of the schedule
ADJECTIVE = 0.2                 # weight of a word before the noun; the noun has 1
SHARE = 0.45                    # a box holds the pixels of a map above this share of its peak
PLACED = 50_000                 # records whose boxes tell where in an image a noun usually is
FINE = 4                        # the map of a phrase has this times the resolution of the latents


@torch.no_grad()
def word_maps(denoiser: Denoiser, branch: DomainBranch, latents: Tensor, prompt: Prompt, schedule: Schedule,
              generator: torch.Generator) -> Tensor:
    """Each word's share of the attention of each pixel of latents (B, C, h, w): (B, T, h, w), a mean over all maps."""
    total, layers, thread = 0, 0, threading.get_ident()

    def add_map(module, args, output) -> None:
        nonlocal total, layers
        if threading.get_ident() != thread:     # another thread samples with the same denoiser
            return
        x, keys_values, keep = args
        query = module.to_query(x).unflatten(-1, (module.heads, -1)).transpose(1, 2)             # (B, heads, S, d)
        scores = query @ keys_values[:, 0].transpose(-1, -2) / math.sqrt(query.shape[-1])      # (B, heads, S, T)
        shares = scores.masked_fill(~keep[:, None, None], -torch.inf).softmax(-1).mean(1)         # (B, S, T)
        rows = round(math.sqrt(x.shape[1] * latents.shape[2] / latents.shape[3]))
        grid = shares.transpose(1, 2).unflatten(-1, (rows, -1))                          # (B, T, rows, columns)
        total, layers = total + F.interpolate(grid, latents.shape[2:], mode="bilinear"), layers + 1

    hooks = [module.cross.register_forward_hook(add_map) for module in denoiser.modules()
             if isinstance(module, SpatialTransformer)]
    try:
        for share in LEVELS:
            t = torch.full((len(latents),), int(share * len(schedule.alpha)), device=latents.device)
            noise = torch.randn(latents.shape, generator=generator, device=latents.device)
            controlled(denoiser, branch, q_sample(latents, noise, t, schedule), t, prompt)
    finally:
        for hook in hooks:
            hook.remove()
    return total / layers


def usual_places(records: Iterable[Record], rows: int, columns: int) -> dict[str, Tensor]:
    """For the last word of each phrase, how often its boxes cover each place, 0..1: (FINE * rows, FINE * columns).

    The first PLACED records are read.
    """
    y, x = (torch.arange(FINE * n).add(0.5) / (FINE * n) for n in (rows, columns))
    covered, seen = defaultdict(lambda: torch.zeros(len(y), len(x))), defaultdict(int)
    for record in islice(records, PLACED):
        for phrase, (cx, cy, w, h) in zip(record.phrases, record.boxes):
            noun = phrase.split()[-1]
            covered[noun] += ((y - cy).abs() < h / 2)[:, None] & ((x - cx).abs() < w / 2)
            seen[noun] += 1
    return {noun: count / seen[noun] for noun, count in covered.items() if count.any()}


def phrase_box(maps: Tensor, caption: str, phrase: str, tokenizer: Tokenizer,
               places: dict[str, Tensor]) -> tuple[Box, float] | None:
    """The box of a phrase and its confidence 0..1, from the maps (T, h, w) of its caption's word pieces.

    None if the caption lacks the phrase.
    """
    ids, pieces = tokenizer.encode(caption, len(maps)), tokenizer.encode(phrase)[1:-1]
    starts = [i for i in range(len(ids) - len(pieces) + 1) if ids[i:i + len(pieces)] == pieces]
    if not starts or not pieces:
        return None
    noun = max(i for i, piece in enumerate(pieces) if tokenizer.starts_word[piece] or i == 0)
    weights = torch.tensor([ADJECTIVE if i < noun else 1.0 for i in range(len(pieces))])
    own = (maps[starts[0]:starts[0] + len(pieces)] * weights[:, None, None]).sum(0)                    # (h, w)
    every = maps[1:len(ids) - 1].mean(0)                            # where any word attends says nothing about this one
    heat = (own / own.sum() / (every / every.sum())).clamp(max=20)[None, None]
    heat = F.avg_pool2d(F.pad(heat, (1, 1, 1, 1), mode="replicate"), 3, 1)
    heat = F.interpolate(heat, scale_factor=FINE, mode="bicubic")[0, 0].clamp(min=0)       # (FINE h, FINE w)
    usual = places.get(phrase.split()[-1])
    heat = heat - heat.min() if usual is None else heat.sqrt() * usual
    inside = heat >= SHARE * heat.max()
    if not inside.any():        # NaN, from broken weights
        return None
    rows, columns = (inside.any(axis).nonzero()[:, 0] for axis in (1, 0))
    top, bottom, left, right = (int(v) for v in (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1))
    height, width = heat.shape
    box = (left + right) / 2 / width, (top + bottom) / 2 / height, (right - left) / width, (bottom - top) / height
    return box, float(heat[top:bottom, left:right].sum() / heat.sum().clamp(min=1e-9))
