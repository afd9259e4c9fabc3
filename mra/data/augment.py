"""Views of one image: image and box move together, and a flag says whether the image was mirrored.

MRA section 3, training settings and region encoding. Pretraining uses `pretrain_view`, and `relit` with --light
(0 in all recipes). Fine-tuning uses `finetune_view`, with random erasing at probability --erase. If a view is mirrored,
the caller exchanges "left" and "right" in the caption; the released code leaves them. Read next: words.py.
"""

import math
import random
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mra.data.records import Box

MEAN = np.array((0.48145466, 0.4578275, 0.40821073), np.float32)    # of CLIP, for RGB in 0 .. 1
STD = np.array((0.26862954, 0.26130258, 0.27577711), np.float32)
CROP_AREA = (0.5, 1.0)          # of the image: half a pedestrian still shows most of what its caption says
CROP_STRETCH = (3 / 4, 4 / 3)   # the crop's width / height over the image's own
ERASE_AREA, ERASE_ASPECT = (0.02, 0.4), (0.3, 1 / 0.3)     # of the image; height / width (arXiv 1708.04896)
EDGE = 1e-6                     # of a patch: overlaps below it are rounding


class View(NamedTuple):
    """What the model sees of one image."""
    image: Tensor               # (3, H, W) normalised
    box: Box | None             # (cx, cy, w, h), fractions of this view
    mirrored: bool


def pretrain_view(image: Image.Image, box: Box | None, size: tuple[int, int], rng: random.Random) -> View:
    """A random crop that contains `box`, resized to `size` = (H, W) and mirrored half of the time."""
    cx, cy, w, h = box or (0.5, 0.5, 0.0, 0.0)       # no box: the crop contains the centre of the image
    area, stretch = rng.uniform(*CROP_AREA), math.exp(rng.uniform(*map(math.log, CROP_STRETCH)))
    left, width = _interval(math.sqrt(area * stretch), cx, w, rng)
    top, height = _interval(math.sqrt(area / stretch), cy, h, rng)
    mirrored = rng.random() < 0.5
    if box is not None:
        cx, w = (cx - left) / width, w / width
        cy, h = (cy - top) / height, h / height
        box = (1 - cx if mirrored else cx, cy, min(w, 1.0), min(h, 1.0))
    return View(tensor_of(image, size, (left, top, left + width, top + height), mirrored), box, mirrored)


def finetune_view(image: Image.Image, size: tuple[int, int], rng: random.Random, erase: float) -> View:
    """The whole image, mirrored half of the time. With probability `erase`, a rectangle gets the mean colour."""
    mirrored, erased = rng.random() < 0.5, rng.random() < erase
    pixels = tensor_of(image, size, mirrored=mirrored)              # (3, H, W)
    if erased:
        erase_rectangle(pixels, rng)
    return View(pixels, None, mirrored)


def erase_rectangle(pixels: Tensor, rng: random.Random) -> None:
    """Set the first of ten random rectangles that fits into pixels (3, H, W) to 0, the mean colour."""
    rows, columns = pixels.shape[1:]
    for _ in range(10):
        area = rng.uniform(*ERASE_AREA) * rows * columns
        aspect = math.exp(rng.uniform(*map(math.log, ERASE_ASPECT)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < height < rows and 0 < width < columns:
            top, left = rng.randrange(rows - height + 1), rng.randrange(columns - width + 1)
            pixels[:, top:top + height, left:left + width] = 0
            return


def box_to_patches(box: Box, grid: tuple[int, int]) -> Tensor:
    """The patches that overlap `box`, row by row: (N,) bool, True = use it; never empty."""
    cx, cy, w, h = box
    keep = torch.zeros(grid, dtype=torch.bool)                              # (rows, columns)
    keep[_touched(cy, h, grid[0]), _touched(cx, w, grid[1])] = True
    return keep.flatten()                                                   # (N,)


def _touched(centre: float, length: float, cells: int) -> slice:
    first = min(max(math.floor((centre - length / 2) * cells + EDGE), 0), cells - 1)
    last = math.ceil((centre + length / 2) * cells - EDGE)
    return slice(first, max(last, first + 1))


def _interval(extent: float, centre: float, length: float, rng: random.Random) -> tuple[float, float]:
    """(start, extent) of a random interval in 0 .. 1 that contains the box of this `centre` and `length`."""
    extent = min(max(extent, length), 1.0)
    low, high = max(0.0, centre + length / 2 - extent), min(centre - length / 2, 1 - extent)
    return max(rng.uniform(low, high), 0.0), extent


def tensor_of(image: Image.Image, size: tuple[int, int], crop=(0, 0, 1, 1), mirrored: bool = False) -> Tensor:
    """Crop (left, top, right, bottom as fractions), resize bicubic, mirror, normalise: (3, H, W)."""
    window = tuple(min(part, 1) * full for part, full in zip(crop, (*image.size, *image.size)))
    pixels = np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC, window))     # (H, W, 3)
    if mirrored:
        pixels = pixels[:, ::-1]
    scaled = pixels * (1 / (255 * STD)) - MEAN / STD                                    # (H, W, 3)
    return torch.from_numpy(np.ascontiguousarray(scaled.transpose(2, 0, 1)))            # (3, H, W)


def random_light(image: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Images (B, 3, H, W) in -1..1; a `share` of them gets a random look: exposure, colours, haze and grain.

    Not in the paper. It prepares DaD's autoencoder for the looks of unseen targets, and the retriever with --light.
    """
    def uniform(low: float, high: float, channels: int = 1) -> Tensor:
        return low + (high - low) * torch.rand(len(image), channels, 1, 1, generator=generator, device=image.device)

    x = (image + 1) / 2
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * 2 ** uniform(-1.5, 0.3)                 # saturation
    gain = 2 ** (uniform(-2.2, 0.8) + uniform(-0.6, 0.6, 3))        # exposure, and a colour cast
    gamma = 2 ** uniform(-0.5, 0.5)
    x = (x * gain).clamp(0, 1) ** gamma
    haze = uniform(-0.1, 0.2).clamp(min=0)
    grain = torch.randn(x.shape, generator=generator, device=x.device) * uniform(-0.02, 0.05).clamp(min=0)
    lit = ((haze + (1 - haze) * x + grain) * 2 - 1).clamp(-1, 1)
    return torch.where(uniform(0, 1) < share, lit, image)


def relit(pixels: Tensor, share: float, rng: random.Random) -> Tensor:
    """A normalised image (3, H, W) under `random_light`, with probability `share`."""
    mean, std = torch.from_numpy(MEAN)[:, None, None], torch.from_numpy(STD)[:, None, None]
    generator = torch.Generator().manual_seed(rng.getrandbits(62))
    image = 2 * (pixels * std + mean) - 1                                   # -1..1
    lit = random_light(image[None], share, generator)[0]
    return ((lit + 1) / 2 - mean) / std
