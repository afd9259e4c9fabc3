"""From captions to images: latents and prompts of a set, cached once; guidance; whole batches of samples.

Before: denoiser.py, noising.py. After: prompts.py, fit.py; adapt.py puts them together.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mra import checkpoint
from mra.config import DiffusionConfig
from mra.data.records import open_image
from mra.data.tokenizer import ClipTokenizer, Tokenizer, pad
from mra.data.words import swap_left_right
from mra.diffusion.autoencoder import Autoencoder, StableAutoencoder
from mra.diffusion.denoiser import Denoiser, DomainBranch, Prompt, structure
from mra.diffusion.noising import Denoise, Schedule, diffusion_loss, guided, rescaled

CONDITIONS = ("white", "structure")
PIXELS = 2**19      # of the images that the autoencoder works on at once


class Diffusion(nn.Module):
    """The pretrained base: autoencoder and denoiser, and the schedule of its noise."""

    def __init__(self, config: DiffusionConfig, tokenizer: Tokenizer | ClipTokenizer):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.schedule = Schedule.scaled_linear() if config.stable else Schedule.cosine()
        self.autoencoder = (StableAutoencoder if config.stable else Autoencoder)(config)
        self.denoiser = Denoiser(config)
        self.denoiser.to(memory_format=torch.channels_last)     # convolutions are faster so, on CPU and GPU

    def read(self, captions: Sequence[str]) -> Prompt:
        """Captions -> an encoded prompt; the empty caption is what guidance steers away from."""
        ids, keep = pad([self.tokenizer.encode(caption, self.config.max_tokens) for caption in captions],
                        self.tokenizer.pad_id)
        device = next(self.parameters()).device
        return self.denoiser.read(ids.to(device), keep.to(device))


def read_base(path: Path) -> tuple[Diffusion, dict]:
    """A base that adapt.py has trained, and the facts of its file."""
    tensors, facts = checkpoint.load(path)
    with checkpoint.trusting(path):
        tokenizer, _ = Tokenizer(facts["vocab"], path), (facts["images"], facts["source"])      # it must tell them, too
        size = checkpoint.config_of(DiffusionConfig, facts["size"], tokenizer)
        return checkpoint.build(lambda: Diffusion(size, tokenizer), tensors, path), facts


def read_images(paths: Sequence[str], config: DiffusionConfig, workers: int = 0) -> Tensor:
    """Image files as (N, 3, H, W) uint8."""
    read = partial(_read, size=(config.width, config.height))
    images = torch.empty(len(paths), 3, config.height, config.width, dtype=torch.uint8)
    for place, some in zip(images.split(64), DataLoader(paths, 64, num_workers=workers, collate_fn=read)):
        place.copy_(some)           # whose shared memory is free again
    return images


def _read(paths: list[str], size: tuple[int, int]) -> Tensor:
    return stacked([np.asarray(open_image(path).resize(size, Image.Resampling.BICUBIC)) for path in paths])


def stacked(pictures: list[np.ndarray]) -> Tensor:
    """Pictures (H, W, 3) of one size -> (N, 3, H, W)."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def to_float(images: Tensor) -> Tensor:
    """uint8 0..255 -> -1..1."""
    return images.float() / 127.5 - 1


def to_bytes(images: Tensor) -> Tensor:
    """-1..1 -> uint8 0..255."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5 + 0.5).to(torch.uint8)


@torch.no_grad()
def encode(autoencoder: Autoencoder | StableAutoencoder, images: Tensor, mirrored: bool = False) -> Tensor:
    """uint8 images (N, 3, H, W), or their mirror images, -> latents (N, C, h, w)."""
    device, batch = next(autoencoder.parameters()).device, at_once(*images.shape[2:])
    return torch.cat([autoencoder.encode(to_float((some.flip(-1) if mirrored else some).to(device)))
                      for some in images.split(batch)])


def at_once(height: int, width: int) -> int:
    """How many images the autoencoder works on at once."""
    return max(1, min(256, PIXELS // (height * width)))


@torch.no_grad()
def decode(autoencoder: Autoencoder | StableAutoencoder, latents: Tensor, generator: torch.Generator) -> Tensor:
    """Latents (N, C, h, w) -> uint8 images (N, 3, H, W), with their grain."""
    size, images = [n * autoencoder.factor for n in latents.shape[2:]], []
    for some in latents.split(at_once(*size)):
        noise = torch.randn(len(some), 3, *size, generator=generator, device=some.device)
        images.append(to_bytes(autoencoder.decode(some, noise)))
    return torch.cat(images)


class LatentPairs:
    """The latents of N images and of their mirror images, M captions of them, and their conditions, all cached.

    images (N, 3, H, W) uint8; captions: (index of the image, words); equal ones are kept once. After `read` the states
    of the captions are cached too, in the host's memory.
    """

    def __init__(self, base: Diffusion, images: Tensor, captions: list[tuple[int, str]], condition: str = "white"):
        device, self.states = next(base.parameters()).device, None
        self.latents = torch.cat([encode(base.autoencoder, images, flip) for flip in (False, True)])    # (2N, C, h, w)
        self.conditions = None
        if condition == "structure":
            edges = torch.cat([structure(to_float(some)) for some in images.split(256)]).half().to(device)
            self.conditions = torch.cat([edges, edges.flip(-1)])                                # (2N, 1, H, W)
        words = [caption for _, caption in captions]
        words += [swap_left_right(caption) for caption in words] + [""]
        numbers = {caption: i for i, caption in enumerate(dict.fromkeys(words))}
        ids = [base.tokenizer.encode(caption, base.config.max_tokens) for caption in numbers]
        self.ids, self.keep = (x.to(device) for x in pad(ids, base.tokenizer.pad_id))
        self.caption_of = torch.tensor([numbers[caption] for caption in words], device=device)  # (2M + 1,)
        index = torch.tensor([i for i, _ in captions], device=device)
        self.image_of = torch.cat([index, index + len(images)])                                 # (2M,)
        self.size = images.shape[-2:]

    @torch.no_grad()
    def read(self, denoiser: Denoiser, dtype: torch.dtype) -> None:
        """Encode all captions, once, with a text encoder that is not trained."""
        self.states, kept = [], []
        for ids, keep in zip(self.ids.split(256), self.keep.split(256)):
            prompt = denoiser.read(ids, keep)
            self.states.extend(prompt.states.to(dtype).cpu())
            kept.append(prompt.keep)
        self.keep = torch.cat(kept)

    def prompt(self, denoiser: Denoiser, caption: Tensor) -> Prompt:
        """The encoded captions of these numbers (B,)."""
        keep = self.keep[caption]
        keep = keep[:, :int(keep.sum(1).max())]                                                 # (B, T)
        if self.states is None:
            return denoiser.read(self.ids[caption, :keep.shape[1]], keep)
        states = torch.stack([self.states[i][:keep.shape[1]] for i in caption.tolist()])
        return Prompt(states.to(keep.device), keep)

    def loss(self, denoiser: Denoiser, branch: DomainBranch | None, schedule: Schedule, generator: torch.Generator,
             count: int, drop: float = 0.1, middle: bool = False) -> Tensor:
        """The diffusion loss of `count` random samples, of the base alone or with its branch.

        With chance `drop` a sample has no words; `middle`: see Schedule.draw.
        """
        device = self.latents.device
        pair = torch.randint(len(self.image_of), (count,), generator=generator, device=device)
        image = self.image_of[pair]                                                             # (B,)
        pair[torch.rand(count, generator=generator, device=device) < drop] = len(self.caption_of) - 1
        latents, prompt = self.latents[image], self.prompt(denoiser, self.caption_of[pair])
        condition = (torch.ones(count, 1, *self.size, device=device) if self.conditions is None
                     else self.conditions[image].float())                                       # (B, 1, H, W)
        t = schedule.draw(count, generator, middle)
        noise = torch.randn(latents.shape, generator=generator, device=device)

        def denoise(z: Tensor, t: Tensor) -> Tensor:
            return denoiser(z, t, prompt, None if branch is None else branch(z, t, prompt, condition))

        return diffusion_loss(denoise, latents, noise, t, schedule)


def guide(denoiser: Denoiser, both: Prompt, branch: DomainBranch | None, condition: Tensor | None, text: float,
          domain: float, rescale: float, span: tuple[float, float] = (0, 1000)) -> Denoise:
    """A `denoise` for the samplers, with guidance on the text and on the domain.

    v = v(nothing, base) + domain (v(nothing, branch) - v(nothing, base)) + text (v(words, branch) - v(nothing, branch))

    `both` holds B captions and then the empty one, B times. The domain's null is the base without its branch, which
    was never trained on the target, so neither needs dropping in training. Guidance of 1 costs no pass. Outside `span`,
    the lowest and the highest level t, the text has none: of much noise guidance takes the variety, at little it does
    nothing (Kynkaanniemi et al. 2024).
    """
    count = len(both.keep) // 2
    prompt, nothing = both[:count], both[count:]

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        steered, pulled = text != 1 and span[0] <= t[0] <= span[1], domain != 1 and branch is not None
        passes, asked = (2, both) if steered or pulled else (1, prompt)
        zs, ts = z.repeat(passes, 1, 1, 1), t.repeat(passes)
        control = None if branch is None else branch(zs, ts, asked, condition.repeat(passes, 1, 1, 1))
        found = denoiser(zs, ts, asked, control).float()
        conditional, unconditional = found[:count], found[-count:]      # the same, where only one was asked for
        v = guided(conditional, unconditional, text) if steered else conditional
        if pulled:
            v = v + (domain - 1) * (unconditional - denoiser(z, t, nothing).float())
        return rescaled(v, conditional, rescale)

    return denoise
