"""Quality assessment: which made images are worth training on (MRA section 2).

The paper drops near-greyscale images and, by a pose estimator, malformed people: 10.63 % in all. Here a judge finds
malformed people. It learns, from the frozen base's activations, to tell the target's images from damaged copies. A
threshold decides: --malformed, or --grey-mean and --grey-variance together. Read next: run/parts.py.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mra.config import AdaptConfig
from mra.diffusion.base import Diffusion, encode
from mra.diffusion.noising import q_sample

LEVEL = 0.2         # noise level at which the base looks at an image; 0: clean, 1: pure noise


def scores_of(images: Tensor, judge: "Judge") -> dict[str, Tensor]:
    """The scores (N,) that the filters compare, of uint8 images (N, 3, H, W)."""
    x = images.float() / 255
    apart = (x - x.roll(-1, 1)).abs().flatten(1)                # differences 0..1 between the channels
    return {"colour_mean": apart.mean(1), "colour_variance": apart.var(1), "malformed": judge.score(images)}


def margins(config: AdaptConfig, scores: dict) -> dict[str, float]:
    """How far an image with these scores is from the threshold of each filter; the filter drops it if below 0."""
    grey = max(scores["colour_mean"] - config.grey_mean, scores["colour_variance"] - config.grey_variance)
    return {"greyscale": grey, "malformed": 1 - config.malformed - scores["malformed"]}


def split_for_judge(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The half of the target's images that a judge learns, and two quarters: one sets its threshold, one tests it."""
    return torch.tensor_split(images, (len(images) // 2, len(images) - len(images) // 4))


class Judge:
    """Finds malformed people by a linear map of the frozen base's activations for the latents of an image."""

    def __init__(self, base: Diffusion):
        dim = 16 * (2 * base.config.widths[0] + base.config.widths[-1] + base.config.latent)    # 16 for each channel
        self.head = nn.Sequential(nn.BatchNorm1d(dim, affine=False, momentum=None), nn.Linear(dim, 1))
        self.base, self.whole = base, torch.zeros(0)        # `whole`: sorted log-odds (M,) of whole images

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Features (N, F) of uint8 images (N, 3, H, W): the denoiser's activations and error, at one noise for all."""
        denoiser, schedule, found = self.base.denoiser, self.base.schedule, []
        for z in encode(self.base.autoencoder, images).split(64):
            noise = torch.randn(z.shape[1:], generator=torch.Generator().manual_seed(0)).to(z).expand_as(z)
            t = torch.full((len(z),), int(LEVEL * len(schedule.alpha)), device=z.device)
            maps = denoiser.activations(q_sample(z, noise, t, schedule), t, self.base.encode_text([""] * len(z)))
            error = denoiser.last(maps[-1]) - schedule.truth(z, noise, t)
            # the first level of the encoder, the middle, the last level of the decoder
            found.append(torch.cat([pooled(x) for x in (maps[2], maps[-2], maps[-1], error)], 1))     # (B, F)
        return torch.cat(found)

    def log_odds(self, images: Tensor) -> Tensor:
        """Log-odds (N,) that uint8 images (N, 3, H, W) are damaged; on the CPU."""
        return self.head(self.features(images))[:, 0].detach().cpu()

    def score(self, images: Tensor) -> Tensor:
        """The share (N,) of the `whole` images that look better than each of these."""
        return torch.searchsorted(self.whole, self.log_odds(images)) / len(self.whole)


def pooled(x: Tensor) -> Tensor:
    """Maps (B, C, h, w) -> mean, maximum and minimum in strips of the body (B, 16 C)."""
    strips = F.adaptive_avg_pool2d(x, (4, 2)), F.adaptive_max_pool2d(x, (4, 1)), F.adaptive_max_pool2d(-x, (4, 1))
    return torch.cat([strip.flatten(1) for strip in strips], 1)


def judge_loss(head: nn.Module, good: Tensor, bad: Tensor, generator: torch.Generator, count: int) -> Tensor:
    """Cross-entropy of `count` random features of (N, F), half good (low score), half bad; a scalar."""
    some = [x[torch.randint(len(x), (count // 2,), generator=generator, device=generator.device)] for x in (good, bad)]
    labels = torch.tensor([0.0, 1.0], device=generator.device).repeat_interleave(count // 2)
    return F.binary_cross_entropy_with_logits(head(torch.cat(some))[:, 0].float(), labels)


def distort(images: Tensor, kinds: list[Callable], seed: int) -> Tensor:
    """Damage uint8 images (N, 3, H, W) by the functions `kinds` in turn; each gets a random image as its donor."""
    generator = torch.Generator().manual_seed(seed)
    donors, made = torch.randperm(len(images), generator=generator), torch.empty_like(images)
    for i, donor in enumerate(donors):
        made[i] = kinds[i % len(kinds)](images[i], images[donor], generator)
    return made


def mix_bands(image: Tensor, _: Tensor, generator: torch.Generator) -> Tensor:
    """Four bands of the body in a random order, some of them twice or not at all."""
    order = torch.randint(4, (4,), generator=generator)
    return torch.cat([image.chunk(4, 1)[i] for i in order], 1)


def mix_block(image: Tensor, donor: Tensor, generator: torch.Generator) -> Tensor:
    """A block of the body mixes with another place of the donor, or fades into the sides of the image."""
    _, height, width = image.shape
    high, wide, top, left, fades, down, right, share, soft = torch.rand(9, generator=generator).tolist()
    high, wide = round((0.2 + 0.6 * high) * height), round((0.4 + 0.4 * wide) * width)
    top, left = round(top * (height - high)), round((0.25 + 0.5 * left) * (width - wide))
    place = round((0.1 + 0.8 * down) * height), round((right - 0.5) / 2 * width)
    other = image.roll(width // 2, 2) if fades < 0.5 else donor.roll(place, (1, 2))
    mask, edge = torch.zeros(1, height, width), round(soft * width / 8)
    mask[:, top:top + high, left:left + wide] = min(1.0, 0.4 + share)
    mask = F.avg_pool2d(mask, 2 * edge + 1, 1, edge, count_include_pad=False)
    return torch.lerp(image.float(), other.float(), mask).round().to(torch.uint8)


DAMAGE = [mix_bands, mix_block]
