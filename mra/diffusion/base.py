"""The pretrained base of DaD: autoencoder, denoiser and noise schedule; and images as tensors.

Read next: pairs.py, the training pairs and their loss; sampling.py, which makes images.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mra.config import DiffusionConfig
from mra.data.batches import loader
from mra.data.files import open_image
from mra.data.tokenizer import Tokenizer, pad
from mra.diffusion.autoencoder import Autoencoder
from mra.diffusion.denoiser import Denoiser, TextStates
from mra.diffusion.noising import Schedule

PIXELS = 2**19      # pixels of a batch of the autoencoder


class Diffusion(nn.Module):
    """An autoencoder and a denoiser, with the denoiser's tokenizer and noise schedule."""

    def __init__(self, config: DiffusionConfig, tokenizer: Tokenizer, autoencoder: nn.Module, denoiser: Denoiser,
                 schedule: Schedule):
        super().__init__()
        self.config, self.tokenizer, self.schedule = config, tokenizer, schedule
        self.autoencoder = autoencoder
        self.denoiser = denoiser

    @staticmethod
    def new(config: DiffusionConfig, tokenizer: Tokenizer) -> "Diffusion":
        """Our architecture with random weights."""
        return Diffusion(config, tokenizer, Autoencoder(config), Denoiser(config), Schedule.cosine())

    def encode_text(self, captions: Sequence[str]) -> TextStates:
        """Encode captions; guidance steers away from the empty one."""
        ids, keep = pad([self.tokenizer.encode(caption, self.config.max_tokens) for caption in captions],
                        self.tokenizer.pad_id)
        device = next(self.parameters()).device
        return self.denoiser.encode_text(ids.to(device), keep.to(device))


def read_images(paths: Sequence[str], config: DiffusionConfig, workers: int = 0) -> Tensor:
    """Read image files at the size of `config`: (N, 3, H, W) uint8."""
    read = partial(_read, size=(config.width, config.height))
    images = torch.empty(len(paths), 3, config.height, config.width, dtype=torch.uint8)
    for place, some in zip(images.split(64), loader(paths, workers, 64, collate_fn=read)):
        place.copy_(some)           # frees the shared memory of the loading process
    return images


def _read(paths: list[str], size: tuple[int, int]) -> Tensor:
    pictures = [np.asarray(open_image(path).resize(size, Image.Resampling.BICUBIC)) for path in paths]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def to_float(images: Tensor) -> Tensor:
    """uint8 0..255 -> -1..1."""
    return images.float() / 127.5 - 1


def to_bytes(images: Tensor) -> Tensor:
    """-1..1 -> uint8 0..255."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5 + 0.5).to(torch.uint8)


@torch.no_grad()
def encode(autoencoder: nn.Module, images: Tensor, mirrored: bool = False) -> Tensor:
    """uint8 images (N, 3, H, W), or their mirror images, -> latents (N, C, h, w)."""
    device, latents = next(autoencoder.parameters()).device, []
    for some in images.split(batch_size(*images.shape[2:])):
        if mirrored:
            some = some.flip(-1)
        latents.append(autoencoder.encode(to_float(some.to(device))))
    return torch.cat(latents)


@torch.no_grad()
def decode(autoencoder: nn.Module, latents: Tensor, generator: torch.Generator) -> Tensor:
    """Latents (N, C, h, w) -> uint8 images (N, 3, H, W) with grain."""
    size, images = [n * autoencoder.factor for n in latents.shape[2:]], []
    for some in latents.split(batch_size(*size)):
        noise = torch.randn(len(some), 3, *size, generator=generator, device=some.device)
        images.append(to_bytes(autoencoder.decode(some, noise)))
    return torch.cat(images)


def batch_size(height: int, width: int) -> int:
    return max(1, min(256, PIXELS // (height * width)))
