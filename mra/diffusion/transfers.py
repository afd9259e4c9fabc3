"""Four ways to give source images the look of the target without diffusion: what DaD is compared with.

The first three take the statistics of one random target image for each source image. They also carry over the colours
of that image's person, so they make captions false; the report prints attribute accuracy beside every distance.
Images are (B, 3, H, W) uint8. Before: sampling.py. After: making.py, gap.py.
"""

import torch
from torch import Tensor

from mra.diffusion.autoencoder import OPPONENT, Autoencoder, mix
from mra.diffusion.sampling import decode, encode, to_bytes, to_float

# RGB -> cone responses, whose logarithms OPPONENT makes nearly independent (Reinhard et al. 2001)
LMS = torch.tensor([[0.3811, 0.5783, 0.0402], [0.1967, 0.7244, 0.0782], [0.0241, 0.1288, 0.8444]])
LOW = 0.08          # of the spectrum's height and width: the amplitudes that FDA swaps


def reinhard(images: Tensor, targets: Tensor) -> Tensor:
    """Each image's mean and standard deviation in the log opponent space become its target's (Reinhard et al. 2001)."""
    def to_opponent(x: Tensor) -> Tensor:
        return mix(OPPONENT, (mix(LMS, (to_float(x) + 1) / 2) + 1 / 255).log())

    x = to_opponent(images)
    moved = moved_moments(x, x, to_opponent(targets), (2, 3))
    return to_bytes(mix(LMS.inverse(), mix(OPPONENT.inverse(), moved).exp() - 1 / 255) * 2 - 1)


def moved_moments(x: Tensor, own: Tensor, targets: Tensor, axes: tuple[int, ...]) -> Tensor:
    """x moved as `own` has to move to get the mean and standard deviation of the targets over these axes."""
    std, mean = torch.std_mean(own, axes, keepdim=True)
    target_std, target_mean = torch.std_mean(targets, axes, keepdim=True)
    return (x - mean) / std.clamp(min=1e-4) * target_std + target_mean


def histogram(images: Tensor, targets: Tensor) -> Tensor:
    """Each channel of an image gets the values of its target's channel, rank by rank."""
    values = targets.flatten(2).sort(-1).values
    ranks = images.flatten(2).argsort(dim=-1, stable=True).argsort(-1)
    return values.gather(-1, ranks).view_as(images)


def fourier(images: Tensor, targets: Tensor) -> Tensor:
    """FDA: the lowest frequencies' amplitudes become the target's, phases stay (Yang & Soatto 2020)."""
    x, y = (torch.fft.fftshift(torch.fft.fft2(some.float()), dim=(2, 3)) for some in (images, targets))
    rows, columns = (slice(n // 2 - max(1, round(LOW * n)), n // 2 + max(1, round(LOW * n)) + 1) for n in x.shape[2:])
    amplitude = x.abs()
    amplitude[:, :, rows, columns] = y.abs()[:, :, rows, columns]
    back = torch.fft.ifft2(torch.fft.ifftshift(torch.polar(amplitude, x.angle()), dim=(2, 3))).real
    return back.round().clamp(0, 255).to(torch.uint8)


def transferred(images: Tensor, targets: Tensor, autoencoder: Autoencoder) -> dict[str, Tensor]:
    """The images (B, 3, H, W) in the look of the targets (M, 3, H, W), by each of the four ways."""
    draw = torch.Generator().manual_seed(0)
    donors = targets[torch.randint(len(targets), (len(images),), generator=draw)]
    latents = encode(autoencoder, images)
    moved = match_moments(latents, latents, encode(autoencoder, targets))
    moved = decode(autoencoder, moved, torch.Generator(moved.device).manual_seed(0)).cpu()
    return {"reinhard": reinhard(images, donors), "histogram": histogram(images, donors),
            "fourier": fourier(images, donors), "moments": moved}


def match_moments(latents: Tensor, own: Tensor, targets: Tensor) -> Tensor:
    """Latents (B, C, h, w) of a set, moved as its `own` (N, C, h, w) have to move to get the mean and variance of
    the `targets` (M, C, h, w) in each channel, person and background apart.

    The person is taken to be in the middle of the picture. Unlike the others it takes the moments of the whole target
    set, not of one image.
    """
    inside = torch.zeros(latents.shape[2:], dtype=torch.bool, device=latents.device)
    rows, columns = max(1, inside.shape[0] // 16), inside.shape[1] // 4
    inside[rows:-rows, columns:-columns] = True
    moved = torch.empty_like(latents)
    for region in (inside, ~inside):
        moved[:, :, region] = moved_moments(*(x[:, :, region] for x in (latents, own, targets)), (0, 2))
    return moved
