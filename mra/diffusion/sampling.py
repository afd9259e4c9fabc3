"""From captions to latents in the target's look: guidance, samples of a list of records, calibration.

Read next: prompts.py, filters.py, boxes.py; making.py puts them together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mra.config import AdaptConfig
from mra.data.records import Record
from mra.diffusion.base import Diffusion, encode, read_images
from mra.diffusion.denoiser import Denoiser, DomainBranch, Prompt
from mra.diffusion.noising import Denoise, ddim, dpm_solver, guided, q_sample

SAMPLERS = {"ddim": ddim, "dpm": dpm_solver}


def guide(denoiser: Denoiser, branch: DomainBranch | None, both: Prompt, guidance: float,
          span: tuple[float, float] = (0, 1000)) -> Denoise:
    """A `denoise` for the samplers, with guidance on the text.

    v = v(nothing) + guidance (v(words) - v(nothing));    `both` holds B captions and then the empty one, B times.

    Guidance of 1 costs no second pass. Guidance holds for levels t within `span` = (lowest, highest). Outside it there
    is none: at high noise it takes the variety, at low noise it changes nothing (Kynkaanniemi et al. 2024).
    """
    count = len(both.keep) // 2

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        steered = guidance != 1 and span[0] <= t[0] <= span[1]
        prompt = both if steered else both[:count]
        if steered:
            z, t = z.repeat(2, 1, 1, 1), t.repeat(2)
        control = None if branch is None else branch(z, t, prompt)
        v = denoiser(z, t, prompt, control).float()
        return guided(v[:count], v[count:], guidance) if steered else v

    return denoise


@dataclass(frozen=True)
class Painter:
    """What makes latents of records: the base and its branch, and latents of both sets, where they are needed."""

    config: AdaptConfig
    base: Diffusion
    branch: DomainBranch
    fast_denoiser: nn.Module        # the base's denoiser, compiled if the flags ask for it ...
    fast_branch: nn.Module          # ... and the branch
    target: Tensor | None = None    # (M, C, h, w)
    source: Tensor | None = None    # (N, C, h, w), when the source's images are restyled

    def sample(self, records: Sequence[Record], draw: torch.Generator) -> tuple[Tensor, Prompt]:
        """Latents (B, C, h, w) of the records' first captions, and the prompt they were made with."""
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
        """What sampling starts from (B, C, h, w) and its strength: pure noise, or the records' images, noised."""
        base, device = self.base, draw.device
        noise = torch.randn(len(records), *base.config.shape, generator=draw, device=device)
        if self.config.mode == "generate":
            return noise, 1.0
        images = read_images([record.path for record in records], base.config)
        moved = match_moments(encode(base.autoencoder, images), self.source, self.target)
        visited = base.schedule.trailing(self.config.sampling_steps, self.config.strength)
        if not visited:
            return moved, self.config.strength
        t = torch.full((len(records),), visited[0], device=device)
        return q_sample(moved, noise, t, base.schedule), self.config.strength


def calibration(samples: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, shift), each (C, h, w), that give samples (N, C, h, w) the target's mean and variance at every place.

    Not in the paper. A branch of few steps gets the commonest pose and background a little wrong on average. That is
    measured on samples, which must be many and typical of the whole set, and undone.
    """
    std, mean = torch.std_mean(samples, 0)
    target_std, target_mean = torch.std_mean(target, 0)
    scale = target_std / std.clamp(min=1e-3)        # 0 is possible: one image, restyled without diffusion
    return scale, target_mean - scale * mean


def match_moments(latents: Tensor, own: Tensor, targets: Tensor) -> Tensor:
    """Latents (B, C, h, w), moved as their set's `own` (N, C, h, w) must move to get the moments of the targets.

    Mean and variance of each channel become those of `targets` (M, C, h, w), separately for the person, who is taken
    to be in the middle of the picture, and for the background.
    """
    inside = torch.zeros(latents.shape[2:], dtype=torch.bool, device=latents.device)
    rows, columns = max(1, inside.shape[0] // 16), inside.shape[1] // 4
    inside[rows:-rows, columns:-columns] = True
    moved = torch.empty_like(latents)
    for part in (inside, ~inside):
        moved[:, :, part] = moved_moments(latents[:, :, part], own[:, :, part], targets[:, :, part], (0, 2))
    return moved


def moved_moments(x: Tensor, own: Tensor, targets: Tensor, axes: tuple[int, ...]) -> Tensor:
    """x, moved as `own` must move to get the mean and standard deviation of the targets over these axes."""
    std, mean = torch.std_mean(own, axes, keepdim=True)
    target_std, target_mean = torch.std_mean(targets, axes, keepdim=True)
    return (x - mean) / std.clamp(min=1e-4) * target_std + target_mean
