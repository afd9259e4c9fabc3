"""From captions to latents in the target's look: guidance and samples. Read next: prompts.py."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mra.config import AdaptConfig
from mra.data.records import Record
from mra.diffusion.base import Diffusion, encode, read_images
from mra.diffusion.denoiser import Denoiser, TextStates
from mra.diffusion.noising import Denoise, dpm_solver, q_sample


def guide(denoiser: Denoiser, both: TextStates, guidance: float, span: tuple[float, float] = (0, 1000),
          base: Denoiser | None = None) -> Denoise:
    """A `denoise` for the samplers with classifier-free guidance on the text (Ho & Salimans 2022).

    v = v(empty) + guidance (v(words) - v(empty));    `both` holds B captions and then the empty caption B times.

    Levels t outside `span` = (lowest, highest) have guidance 1: more reduces the variety at high noise and changes
    nothing at low noise (Kynkaanniemi et al. 2024). A `denoiser` that has learned no words takes v(words) - v(empty)
    from the `base`: a product of two models (Liu et al. 2022).
    """
    count = len(both.keep) // 2

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        scale = guidance if span[0] <= t[0] <= span[1] else 1.0
        if base is None and scale == 1:
            return denoiser(z, t, both[:count]).float()
        words, empty = (base or denoiser)(z.repeat(2, 1, 1, 1), t.repeat(2), both).float().chunk(2)
        start = empty if base is None else denoiser(z, t, both[count:]).float()
        return start + scale * (words - empty)

    return denoise


class Painter:
    """Samples latents in the target's look."""

    def __init__(self, config: AdaptConfig, base: Diffusion, adapted: Denoiser, labelled: bool, target: Tensor,
                 source_sample: Sequence[Record]):
        """`labelled`: `adapted` knows words. `target`: uint8 images (N, 3, H, W). `source_sample`: only to restyle."""
        self.config, self.base, self.adapted = config, base, adapted
        self.words_from = None if labelled else base.denoiser       # None: from `adapted`
        self.target_latents = self.source_latents = None        # (N, C, h, w) each; None unless images are restyled
        if source_sample:
            self.target_latents = encode(base.autoencoder, target)
            images = read_images([record.path for record in source_sample], base.config, config.workers)
            self.source_latents = encode(base.autoencoder, images)

    @torch.no_grad()
    def sample(self, drafts: Sequence[Record], generator: torch.Generator) -> Tensor:
        """Latents (B, C, h, w) for drafts: from pure noise, or from their noised images (SDEdit, Meng et al. 2022)."""
        config, base = self.config, self.base
        noise = torch.randn(len(drafts), *base.config.shape, generator=generator, device=generator.device)
        start, strength = noise, 1.0
        if config.mode == "restyle":
            images, strength = read_images([draft.path for draft in drafts], base.config), config.strength
            start = transfer_moments(encode(base.autoencoder, images), self.source_latents, self.target_latents)
            visited = base.schedule.trailing(config.sampling_steps, strength)
            if visited:
                t = torch.full((len(drafts),), visited[0], device=generator.device)
                start = q_sample(start, noise, t, base.schedule)
        both = base.encode_text([draft.captions[0] for draft in drafts] + [""] * len(drafts))
        levels = len(base.schedule.alpha)
        span = config.guidance_from * levels, config.guidance_to * levels
        denoise = guide(self.adapted, both, config.guidance, span, self.words_from)
        return dpm_solver(denoise, start, base.schedule, config.sampling_steps, strength)


def transfer_moments(latents: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Map latents (B, C, h, w) so that the source gets the target's mean and variance (Reinhard et al. 2001).

    Each channel has a map for the person, who is taken to be in the middle of the image, and one for the background.
    `source` and `target` (N, C, h, w) are latents of the two sets; `latents` belong to the source.
    """
    inside = torch.zeros(latents.shape[2:], dtype=torch.bool, device=latents.device)
    rows, columns = max(1, inside.shape[0] // 16), inside.shape[1] // 4
    inside[rows:-rows, columns:-columns] = True
    moved = torch.empty_like(latents)
    for part in (inside, ~inside):
        std, mean = torch.std_mean(source[:, :, part], (0, 2), keepdim=True)                      # (1, C, 1)
        target_std, target_mean = torch.std_mean(target[:, :, part], (0, 2), keepdim=True)
        moved[:, :, part] = (latents[:, :, part] - mean) / std.clamp(min=1e-4) * target_std + target_mean
    return moved
