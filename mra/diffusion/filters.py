"""Quality assessment: which made images are worth training on (MRA section 2).

The paper drops near-greyscale images and, with a pose estimator, distorted people: 10.63 % in all. Here a small
network that has seen the target's photographs and what cutting and pasting does to them tells distorted people; a
retriever, where there is one, tells images that do not show their caption. Each filter is a function of images to a
score, and a threshold in AdaptConfig decides. Before: sampling.py. After: making.py, gap.py.
"""

import threading
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mra.data.augment import MEAN, STD
from mra.data.tokenizer import Tokenizer, pad
from mra.diffusion.autoencoder import group_norm
from mra.diffusion.sampling import to_float
from mra.retriever import Retriever

ONE_AT_A_TIME = threading.Lock()
DETAIL = 4.0        # how much a judge's view of detail is amplified


class Judge(nn.Module):
    """A small convolutional network: images (B, 3, H, W) in -1..1 -> features (B, 128) -> scores (B, outputs).

    It looks at full resolution first, and beside the image at what its 3x3 mean leaves out, so that grain and blur
    count; and it keeps four strips from head to foot apart.
    """

    def __init__(self, outputs: int):
        super().__init__()
        layers, dim = [], 6
        for width, stride in ((24, 1), (48, 2), (96, 2), (128, 2)):
            layers += [nn.Conv2d(dim, width, 3, stride, 1), group_norm(width), nn.SiLU()]
            dim = width
        self.trunk = nn.Sequential(*layers, nn.AdaptiveAvgPool2d((4, 1)), nn.Flatten(), nn.Linear(4 * dim, 128))
        self.head = nn.Sequential(nn.SiLU(), nn.Linear(128, outputs))

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.features(image))

    def features(self, image: Tensor) -> Tensor:
        detail = image - F.avg_pool2d(image, 3, 1, 1, count_include_pad=False)
        return self.trunk(torch.cat([image, DETAIL * detail], 1))

    @torch.inference_mode()
    def score(self, images: Tensor, features: bool = False) -> Tensor:
        """Scores (N, outputs), or features (N, 128), of uint8 images (N, 3, H, W), on the CPU."""
        device, part = next(self.parameters()).device, self.features if features else self
        return torch.cat([part(to_float(some.to(device))).float().cpu() for some in images.split(256)])


def tell_apart(first: Tensor, second: Tensor, steps: int, seed: int, device: torch.device, batch: int = 64) -> Judge:
    """A judge trained to give uint8 images of `first` a negative score and of `second` a positive one, from as many
    of each in every batch, mirrored at random."""
    with ONE_AT_A_TIME:                             # threads share the generator that initialises weights
        torch.manual_seed(seed)
        judge = Judge(1).to(device, memory_format=torch.channels_last)
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(judge.parameters(), 2e-3, weight_decay=0.05)
    labels = (torch.arange(batch, device=device) >= batch // 2).float()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        some = torch.cat([images[torch.randint(len(images), (batch // 2,), generator=draw)]
                          for images in (first, second)]).to(device)
        some = torch.where(torch.rand(batch, 1, 1, 1, generator=draw).to(device) < 0.5, some.flip(-1), some)
        F.binary_cross_entropy_with_logits(judge(to_float(some))[:, 0], labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return judge.eval()


def colourfulness(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (N,) over an image's pixels of the differences between its channels, 0..1."""
    x = images.float() / 255
    apart = (x - x.roll(-1, 1)).abs().flatten(1)
    return apart.mean(1), apart.var(1)


def distort(images: Tensor, kinds: list[Callable], seed: int) -> Tensor:
    """Images (N, 3, H, W), each made a malformed person by one of `kinds` in turn, with another of them as donor."""
    generator = torch.Generator().manual_seed(seed)
    donors, made = torch.randperm(len(images), generator=generator), torch.empty_like(images)
    for i, donor in enumerate(donors):
        made[i] = kinds[i % len(kinds)](images[i], images[donor], generator)
    return made


def shuffle_bands(image: Tensor, donor: Tensor, generator: torch.Generator) -> Tensor:
    """Head, trunk and legs in a wrong order."""
    bands = image.chunk(4, 1)
    order = torch.randperm(4, generator=generator).tolist()
    return torch.cat([bands[i] for i in (order if order != [0, 1, 2, 3] else order[::-1])], 1)


def replace_block(image: Tensor, donor: Tensor, generator: torch.Generator) -> Tensor:
    """A block of the body is another place of another picture."""
    _, height, width = image.shape
    y, x = (int(torch.randint(n // 2, (1,), generator=generator)) for n in (height, width))
    left = x // 2 + width // 8
    block = slice(None), slice(y, y + height // 2), slice(left, left + width // 2)
    image = image.clone()
    image[block] = donor.roll((height // 2, width // 4), (1, 2))[block]
    return image


def shift_half(image: Tensor, donor: Tensor, generator: torch.Generator) -> Tensor:
    """Everything below a line slides sideways."""
    _, height, width = image.shape
    line = height // 4 + int(torch.randint(height // 2, (1,), generator=generator))
    image = image.clone()
    image[:, line:] = image[:, line:].roll(width // 4 + int(torch.randint(width // 4, (1,), generator=generator)), 2)
    return image


def join_halves(image: Tensor, donor: Tensor, generator: torch.Generator) -> Tensor:
    """The left half of one person and the right half of another, upside down."""
    half = image.shape[2] // 2
    return torch.cat([image[:, :, :half], donor.flip(1)[:, :, half:]], 2)


def overlay(image: Tensor, donor: Tensor, generator: torch.Generator) -> Tensor:
    """Two people at the same place, each half transparent."""
    shift = image.shape[2] // 8 + int(torch.randint(image.shape[2] // 4, (1,), generator=generator))
    return ((image.float() + donor.roll(shift, 2).float()) / 2).round().to(torch.uint8)


def repeat_band(image: Tensor, donor: Tensor, generator: torch.Generator) -> Tensor:
    """A quarter of the body twice, below each other or stretched to twice its length."""
    quarter, top = image.shape[1] // 4, int(torch.randint(image.shape[1] // 2, (1,), generator=generator))
    band = image[:, top:top + quarter]
    twice = band.repeat_interleave(2, 1) if torch.rand((), generator=generator) < 0.5 else band.repeat(1, 2, 1)
    return torch.cat([image[:, :top], twice, image[:, top + quarter:]], 1)[:, :image.shape[1]]


SEEN, UNSEEN = [shuffle_bands, replace_block, overlay, repeat_band], [shift_half, join_halves]   # to learn, to test


@torch.inference_mode()
def agreement(model: Retriever, tokenizer: Tokenizer, images: Tensor, captions: list[str]) -> Tensor:
    """Log-odds (N,) of the retriever's matching head that each uint8 image shows its caption, all at once."""
    config, device = model.config, next(model.parameters()).device
    mean, std = (torch.from_numpy(x).view(3, 1, 1).to(device) for x in (MEAN, STD))
    x = F.interpolate(images.to(device) / 255, (config.height, config.width), mode="bicubic", antialias=True)
    tokens, _ = model.encode_image((x.clamp(0, 1) - mean) / std)
    ids, keep = (x.to(device) for x in pad([tokenizer.encode(caption, config.max_tokens) for caption in captions],
                                           tokenizer.pad_id))
    text, _ = model.encode_text(ids, keep)
    logits = model.match(text, keep, model.fusion_encoder.memories(tokens))
    return (logits[:, 1] - logits[:, 0]).float().cpu()
