"""The training pairs of the denoiser and the branch: cached latents and captions. Read next: sampling.py."""

import torch
from torch import Tensor

from mra.data.tokenizer import pad
from mra.data.words import swap_left_right
from mra.diffusion.base import Diffusion, encode
from mra.diffusion.denoiser import Denoiser, TextStates
from mra.diffusion.noising import diffusion_loss

NO_WORDS = 0.1      # chance of an empty caption, which guidance needs


class LatentPairs:
    """Pairs of a caption and an image's latents, each also mirrored: left and right are exchanged in the caption.

    Made from uint8 images (N, 3, H, W) and L captions (index of the image, words). Equal captions are stored once.
    """

    def __init__(self, base: Diffusion, images: Tensor, captions: list[tuple[int, str]]):
        device, self.base, self.states = next(base.parameters()).device, base, None
        self.latents = torch.cat([encode(base.autoencoder, images, flip) for flip in (False, True)])    # (2N, C, h, w)
        words = [caption for _, caption in captions]
        words += [swap_left_right(caption) for caption in words] + [""]
        numbers = {caption: i for i, caption in enumerate(dict.fromkeys(words))}
        ids = [base.tokenizer.encode(caption, base.config.max_tokens) for caption in numbers]
        self.ids, self.keep = (x.to(device) for x in pad(ids, base.tokenizer.pad_id))           # distinct captions
        self.caption_of = torch.tensor([numbers[caption] for caption in words], device=device)  # (2L + 1,), "" last
        index = torch.tensor([i for i, _ in captions], device=device)
        self.image_of = torch.cat([index, index + len(images)])                                 # (2L,)

    @torch.no_grad()
    def encode_captions(self, dtype: torch.dtype) -> None:
        """Encode all captions once, by the base's frozen text encoder."""
        self.states, kept = [], []
        for ids, keep in zip(self.ids.split(256), self.keep.split(256)):
            text = self.base.denoiser.encode_text(ids, keep)
            self.states.extend(text.states.to(dtype).cpu())
            kept.append(text.keep)          # Stable Diffusion also attends to the padding
        self.keep = torch.cat(kept)

    def text_states(self, caption: Tensor) -> TextStates:
        """The text states of captions, given by their numbers (B,) among the distinct ones."""
        keep = self.keep[caption]
        keep = keep[:, :int(keep.sum(1).max())]                                                 # (B, T)
        if self.states is None:
            return self.base.denoiser.encode_text(self.ids[caption, :keep.shape[1]], keep)
        states = torch.stack([self.states[i][:keep.shape[1]] for i in caption.tolist()])
        return TextStates(states.to(keep.device), keep)

    def loss(self, generator: torch.Generator, count: int, adapted: Denoiser | None = None) -> Tensor:
        """The diffusion loss of `count` random pairs, a scalar; logit-normal levels for the branch of our base."""
        device, denoiser, schedule = self.latents.device, adapted or self.base.denoiser, self.base.schedule
        pair = torch.randint(len(self.image_of), (count,), generator=generator, device=device)
        latents = self.latents[self.image_of[pair]]                                             # (B, C, h, w)
        caption = self.caption_of[pair]                                                         # (B,)
        caption[torch.rand(count, generator=generator, device=device) < NO_WORDS] = self.caption_of[-1]     # ""
        text = self.text_states(caption)
        logit_normal = adapted is not None and not self.base.config.stable
        t = schedule.random_levels(count, generator, logit_normal)                              # (B,)
        noise = torch.randn(latents.shape, generator=generator, device=device)
        return diffusion_loss(lambda z, level: denoiser(z, level, text), latents, noise, t, schedule)
