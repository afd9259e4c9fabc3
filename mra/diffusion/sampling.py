"""From captions to images: latents and prompts of a set, cached once; guidance; whole batches of samples.

Before: denoiser.py, noising.py. After: prompts.py, fit.py; adapt.py puts them together.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mra import checkpoint
from mra.config import DiffusionConfig
from mra.data.records import open_image
from mra.data.tokenizer import Tokenizer, checked, pad
from mra.data.words import swap_left_right
from mra.diffusion.autoencoder import Autoencoder
from mra.diffusion.denoiser import Denoiser, DomainBranch, Prompt, structure
from mra.diffusion.noising import Denoise, Schedule, diffusion_loss, guided, rescaled

CONDITIONS = ("white", "structure")


class Diffusion(nn.Module):
    """The pretrained base: autoencoder and denoiser."""

    def __init__(self, config: DiffusionConfig, tokenizer: Tokenizer):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.autoencoder, self.denoiser = Autoencoder(config), Denoiser(config)
        self.denoiser.to(memory_format=torch.channels_last)     # convolutions are faster so, on CPU and GPU

    def read(self, captions: Sequence[str]) -> Prompt:
        """Captions -> an encoded prompt; the empty caption is what guidance steers away from."""
        ids, keep = pad([self.tokenizer.encode(caption, self.config.max_tokens) for caption in captions],
                        self.tokenizer.pad_id)
        device = self.autoencoder.mean.device
        return self.denoiser.read(ids.to(device), keep.to(device))


def read_base(path: Path) -> tuple[Diffusion, dict]:
    """A base that adapt.py has trained, and the facts of its file."""
    tensors, facts = checkpoint.load(path)
    with checkpoint.trusting(path):
        tokenizer, _ = Tokenizer(checked(facts["vocab"], path)), (facts["images"], facts["source"])
        size = checkpoint.config_of(DiffusionConfig, facts["size"], tokenizer)
        return checkpoint.build(lambda: Diffusion(size, tokenizer), tensors, path), facts


class Crops(torch.utils.data.Dataset):
    """Image files as (3, H, W) uint8."""

    def __init__(self, paths: Sequence[str], config: DiffusionConfig):
        self.paths, self.size = paths, (config.width, config.height)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        image = open_image(self.paths[index]).resize(self.size, Image.Resampling.BICUBIC)
        return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())

    def read(self, workers: int = 0) -> Tensor:
        """All of them, (N, 3, H, W) uint8."""
        return torch.cat(list(torch.utils.data.DataLoader(self, 64, num_workers=workers)))


def to_float(images: Tensor) -> Tensor:
    """uint8 0..255 -> -1..1."""
    return images.float() / 127.5 - 1


def to_bytes(images: Tensor) -> Tensor:
    """-1..1 -> uint8 0..255."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5 + 0.5).to(torch.uint8)


@torch.no_grad()
def encode(autoencoder: Autoencoder, images: Tensor, batch: int = 256) -> Tensor:
    """uint8 images (N, 3, H, W) -> latents (N, C, h, w)."""
    device = autoencoder.mean.device
    return torch.cat([autoencoder.encode(to_float(some.to(device))) for some in images.split(batch)])


@torch.no_grad()
def decode(autoencoder: Autoencoder, latents: Tensor, generator: torch.Generator, batch: int = 256) -> Tensor:
    """Latents (N, C, h, w) -> uint8 images (N, 3, H, W), with their grain."""
    def noise(some: Tensor) -> Tensor:
        rows, columns = (n * autoencoder.factor for n in some.shape[2:])
        return torch.randn(len(some), 3, rows, columns, generator=generator, device=some.device)

    return torch.cat([to_bytes(autoencoder.decode(some, noise(some))) for some in latents.split(batch)])


class LatentPairs:
    """The latents of N images and of their mirror images, M captions of them, and their conditions, all cached.

    images (N, 3, H, W) uint8; captions: (index of the image, words). `draw` picks random samples of them.
    """

    def __init__(self, autoencoder: Autoencoder, images: Tensor, captions: list[tuple[int, str]],
                 tokenizer: Tokenizer, condition: str = "white"):
        device = autoencoder.mean.device
        self.latents = torch.cat([encode(autoencoder, images), encode(autoencoder, images.flip(-1))])    # (2N, C, h, w)
        self.conditions = None
        if condition == "structure":
            edges = torch.cat([structure(to_float(some)) for some in images.split(256)]).half().to(device)
            self.conditions = torch.cat([edges, edges.flip(-1)])                                # (2N, 1, H, W)
        words = [caption for _, caption in captions]
        words += [swap_left_right(caption) for caption in words] + [""]
        self.ids, self.keep = (x.to(device) for x in pad([tokenizer.encode(w) for w in words], tokenizer.pad_id))
        index = torch.tensor([i for i, _ in captions], device=device)
        self.image_of = torch.cat([index, index + len(images)])                                 # (2M,)
        self.size = images.shape[-2:]

    def draw(self, generator: torch.Generator, count: int, drop: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Latents (B, C, h, w), ids and keep (B, T), condition (B, 1, H, W); with chance `drop` without words."""
        device = self.latents.device
        pair = torch.randint(len(self.image_of), (count,), generator=generator, device=device)
        image = self.image_of[pair]
        pair[torch.rand(count, generator=generator, device=device) < drop] = len(self.ids) - 1
        longest = int(self.keep[pair].sum(1).max())
        condition = (torch.ones(count, 1, *self.size, device=device) if self.conditions is None
                     else self.conditions[image].float())
        return self.latents[image], self.ids[pair, :longest], self.keep[pair, :longest], condition

    def loss(self, denoiser: Denoiser, branch: DomainBranch | None, schedule: Schedule, generator: torch.Generator,
             count: int, drop: float = 0.1) -> Tensor:
        """The diffusion loss of `count` samples, of the base alone or with its branch."""
        latents, ids, keep, condition = self.draw(generator, count, drop)
        t = schedule.draw(count, generator)
        noise = torch.randn(latents.shape, generator=generator, device=latents.device)
        prompt = denoiser.read(ids, keep)

        def denoise(z: Tensor, t: Tensor) -> Tensor:
            return denoiser(z, t, prompt, branch and branch(z, t, prompt, condition))

        return diffusion_loss(denoise, latents, noise, t, schedule)


def guide(denoiser: Denoiser, prompt: Prompt, nothing: Prompt, branch: DomainBranch | None, condition: Tensor | None,
          text: float, domain: float, rescale: float) -> Denoise:
    """A `denoise` for the samplers, with guidance on the text and on the domain.

    v = v(nothing, base) + domain (v(nothing, branch) - v(nothing, base)) + text (v(words, branch) - v(nothing, branch))

    `nothing` is the empty caption, B times. The domain's null is the base without its branch, which was never trained
    on the target, so neither needs dropping in training. Guidance of 1 costs no pass.
    """
    both = Prompt(torch.cat([prompt.states, nothing.states]), torch.cat([prompt.keep, nothing.keep]))

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        def predict(passes: int, asked: Prompt) -> Tensor:
            zs, ts = z.repeat(passes, 1, 1, 1), t.repeat(passes)
            return denoiser(zs, ts, asked, branch and branch(zs, ts, asked, condition.repeat(passes, 1, 1, 1))).float()

        if text == 1:
            v = conditional = predict(1, prompt)
        else:
            conditional, unconditional = predict(2, both).chunk(2)
            v = guided(conditional, unconditional, text)
        if domain != 1 and branch:
            v = v + (domain - 1) * (predict(1, nothing) - denoiser(z, t, nothing).float())
        return rescaled(v, conditional, rescale)

    return denoise
