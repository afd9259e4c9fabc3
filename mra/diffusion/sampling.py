"""From captions to latents in the target's look: guidance, samples and their calibration.

Read next: prompts.py, filters.py, boxes.py; making.py puts them together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mra.config import AdaptConfig
from mra.data.records import Record
from mra.diffusion.base import Diffusion, encode, read_images
from mra.diffusion.denoiser import Denoiser, DomainBranch, Prompt, controlled
from mra.diffusion.noising import Denoise, ddim, dpm_solver, q_sample

SAMPLERS = {"ddim": ddim, "dpm": dpm_solver}


def guide(denoiser: Denoiser, branch: DomainBranch | None, both: Prompt, guidance: float,
          span: tuple[float, float] = (0, 1000)) -> Denoise:
    """A `denoise` for the samplers with classifier-free guidance on the text (Ho & Salimans 2022).

    v = v(empty) + guidance (v(words) - v(empty));    `both` holds B captions and then the empty caption B times.

    Levels t outside `span` = (lowest, highest) are not guided: guidance reduces the variety at high noise and changes
    nothing at low noise (Kynkaanniemi et al. 2024).
    """
    count = len(both.keep) // 2

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        if guidance == 1 or not span[0] <= t[0] <= span[1]:
            return controlled(denoiser, branch, z, t, both[:count]).float()
        v = controlled(denoiser, branch, z.repeat(2, 1, 1, 1), t.repeat(2), both).float()
        words, empty = v.chunk(2)
        return empty + guidance * (words - empty)

    return denoise


@dataclass(frozen=True)
class Painter:
    """Makes latents from records: the base and its branch, and the latents of the two sets."""

    config: AdaptConfig
    base: Diffusion
    branch: DomainBranch
    fast_denoiser: nn.Module                # denoiser and branch, compiled with --compile
    fast_branch: nn.Module
    target_latents: Tensor | None           # (N, C, h, w); None: images are generated beside Stable Diffusion
    source_latents: Tensor | None           # (N, C, h, w); None: images are not restyled

    def sample(self, records: Sequence[Record], draw: torch.Generator) -> tuple[Tensor, Prompt]:
        """Latents (B, C, h, w) made from the records' first captions, and the encoded captions."""
        config, schedule = self.config, self.base.schedule
        start, strength = self.start(records, draw)
        captions = [record.captions[0] for record in records]
        both = self.base.read(captions + [""] * len(captions))
        levels = len(schedule.alpha)
        span = config.guidance_from * levels, config.guidance_to * levels
        denoise = guide(self.fast_denoiser, self.fast_branch, both, config.guidance, span)
        latents = SAMPLERS[config.sampler](denoise, start, schedule, config.sampling_steps, strength)
        return latents, both[:len(captions)]

    def start(self, records: Sequence[Record], draw: torch.Generator) -> tuple[Tensor, float]:
        """Latents (B, C, h, w) and strength that sampling starts with: pure noise, or the records' noised images."""
        base, device = self.base, draw.device
        noise = torch.randn(len(records), *base.config.shape, generator=draw, device=device)
        if self.config.mode == "generate":
            return noise, 1.0
        images = read_images([record.path for record in records], base.config)
        moved = match_moments(encode(base.autoencoder, images), self.source_latents, self.target_latents)
        visited = base.schedule.trailing(self.config.sampling_steps, self.config.strength)
        if not visited:
            return moved, self.config.strength
        t = torch.full((len(records),), visited[0], device=device)
        return q_sample(moved, noise, t, base.schedule), self.config.strength


def calibration(samples: Tensor, target_latents: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, shift), each (C, h, w): all sampled latents are replaced by scale * latents + shift. Not in the paper.

    A branch that was trained for few steps gets the mean and variance at a place a little wrong, for example the usual
    background. Scale and shift give `samples` (N, C, h, w) the target's mean and variance at every place. The samples
    must be many and typical of the whole set.
    """
    std, mean = torch.std_mean(samples, 0)
    target_std, target_mean = torch.std_mean(target_latents, 0)
    scale = target_std / std.clamp(min=1e-3)        # 0 is possible: one image, restyled without diffusion
    return scale, target_mean - scale * mean


def match_moments(latents: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Move latents (B, C, h, w) by the map that gives the source the mean and variance of the target.

    Each channel has a map for the person, who is taken to be in the middle of the image, and one for the background.
    `source` and `target` (N, C, h, w) are latents of the two sets; `latents` belong to the source.
    """
    inside = torch.zeros(latents.shape[2:], dtype=torch.bool, device=latents.device)
    rows, columns = max(1, inside.shape[0] // 16), inside.shape[1] // 4
    inside[rows:-rows, columns:-columns] = True
    moved = torch.empty_like(latents)
    for part in (inside, ~inside):
        moved[:, :, part] = moved_moments(latents[:, :, part], source[:, :, part], target[:, :, part], (0, 2))
    return moved


def moved_moments(x: Tensor, source: Tensor, target: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Move x by the map that gives the source the target's mean and standard deviation over these axes."""
    std, mean = torch.std_mean(source, axes, keepdim=True)
    target_std, target_mean = torch.std_mean(target, axes, keepdim=True)
    return (x - mean) / std.clamp(min=1e-4) * target_std + target_mean
