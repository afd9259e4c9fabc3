"""Quality assessment: which made images are worth training on (MRA section 2).

The paper drops near-greyscale images and, by a pose estimator, malformed people: 10.63 % in all. Here a small network
finds malformed people. It learns to tell the target's images from damaged copies of them. A filter gives each image a
score, and a threshold decides: --malformed, or --grey-mean and --grey-variance together. Read next: run/parts.py.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mra.config import AdaptConfig
from mra.diffusion.autoencoder import group_norm
from mra.diffusion.base import to_float

DETAIL = 4.0        # amplification of the detail that a judge sees
FILTERS = ("greyscale", "malformed")


def scores_of(images: Tensor, judge: "Judge") -> dict[str, Tensor]:
    """The scores (N,) that the filters compare, of uint8 images (N, 3, H, W)."""
    x = images.float() / 255
    apart = (x - x.roll(-1, 1)).abs().flatten(1)                # differences 0..1 between the channels
    return {"colour_mean": apart.mean(1), "colour_variance": apart.var(1), "malformed": judge.score(images)[:, 0]}


def filters_of(config: AdaptConfig, scores: dict) -> list[str]:
    """Names of the filters that drop an image with these scores."""
    grey = scores["colour_mean"] < config.grey_mean and scores["colour_variance"] < config.grey_variance
    drops = {"greyscale": grey, "malformed": scores["malformed"] > config.malformed}
    return [name for name in FILTERS if drops[name]]


class Judge(nn.Module):
    """A small convolutional network: images (B, 3, H, W) in -1..1 -> features (B, 128) -> scores (B, outputs).

    It sees the image and, for grain and blur, the difference to the 3x3 mean. Strips of the body are pooled apart.
    """

    outputs = 1

    def __init__(self):
        super().__init__()
        layers, dim = [], 6
        for width, stride in ((24, 1), (48, 2), (96, 2), (128, 2)):
            layers += [nn.Conv2d(dim, width, 3, stride, 1), group_norm(width), nn.SiLU()]
            dim = width
        self.trunk = nn.Sequential(*layers, nn.AdaptiveAvgPool2d((4, 1)), nn.Flatten(), nn.Linear(4 * dim, 128))
        self.head = nn.Sequential(nn.SiLU(), nn.Linear(128, self.outputs))

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.features(image))

    def features(self, image: Tensor) -> Tensor:
        detail = image - F.avg_pool2d(image, 3, 1, 1, count_include_pad=False)
        return self.trunk(torch.cat([image, DETAIL * detail], 1))

    @torch.inference_mode()
    def score(self, images: Tensor) -> Tensor:
        """Scores (N, outputs) of uint8 images (N, 3, H, W); on the CPU."""
        device = next(self.parameters()).device
        return torch.cat([self(to_float(some.to(device))).float().cpu() for some in images.split(256)])


def judge_loss(judge: Judge, good: Tensor, bad: Tensor, draw: torch.Generator, count: int) -> Tensor:
    """Cross-entropy of `count` random uint8 images (N, 3, H, W), half good (low score), half bad; a scalar."""
    device, some = draw.device, []
    for images in (good, bad):
        chosen = torch.randint(len(images), (count // 2,), generator=draw, device=device)
        some.append(images[chosen.cpu()].to(device))
    x = torch.cat(some)                                                                  # (count, 3, H, W)
    mirrored = torch.rand(len(x), 1, 1, 1, generator=draw, device=device) < 0.5
    x = to_float(torch.where(mirrored, x.flip(-1), x))
    labels = (torch.arange(len(x), device=device) >= count // 2).float()
    return F.binary_cross_entropy_with_logits(judge(x)[:, 0].float(), labels)


def distort(images: Tensor, kinds: list[Callable], seed: int) -> Tensor:
    """Damage uint8 images (N, 3, H, W) by the functions `kinds` in turn; each gets a random image as its donor."""
    generator = torch.Generator().manual_seed(seed)
    donors, made = torch.randperm(len(images), generator=generator), torch.empty_like(images)
    for i, donor in enumerate(donors):
        made[i] = kinds[i % len(kinds)](images[i], images[donor], generator)
    return made


def shuffle_bands(image: Tensor, donor: Tensor, generator: torch.Generator) -> Tensor:
    """Four bands of the body in a wrong order."""
    bands = image.chunk(4, 1)
    order = torch.randperm(4, generator=generator).tolist()
    if order == [0, 1, 2, 3]:
        order.reverse()
    return torch.cat([bands[i] for i in order], 1)


def replace_block(image: Tensor, donor: Tensor, generator: torch.Generator) -> Tensor:
    """A block of the body is replaced by another place of the donor."""
    _, height, width = image.shape
    y, x = (int(torch.randint(n // 2, (1,), generator=generator)) for n in (height, width))
    left = x // 2 + width // 8
    block = slice(None), slice(y, y + height // 2), slice(left, left + width // 2)
    image = image.clone()
    image[block] = donor.roll((height // 2, width // 4), (1, 2))[block]
    return image


def overlay(image: Tensor, donor: Tensor, generator: torch.Generator) -> Tensor:
    """Two people in one place, each half transparent."""
    shift = image.shape[2] // 8 + int(torch.randint(image.shape[2] // 4, (1,), generator=generator))
    return ((image.float() + donor.roll(shift, 2).float()) / 2).round().to(torch.uint8)


def repeat_band(image: Tensor, donor: Tensor, generator: torch.Generator) -> Tensor:
    """A quarter of the body is repeated below itself, or stretched to twice its length."""
    quarter, top = image.shape[1] // 4, int(torch.randint(image.shape[1] // 2, (1,), generator=generator))
    band = image[:, top:top + quarter]
    twice = band.repeat_interleave(2, 1) if torch.rand((), generator=generator) < 0.5 else band.repeat(1, 2, 1)
    return torch.cat([image[:, :top], twice, image[:, top + quarter:]], 1)[:, :image.shape[1]]


DAMAGE = [shuffle_bands, replace_block, overlay, repeat_band]
