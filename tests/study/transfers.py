"""Four transfers that give source images the look of the target without diffusion: the baselines of DaD.

The first three take the statistics of one random target image for each source image. They also carry over the colours
of that image's person, which makes captions false. So the report states the accuracy of colours beside every distance.
Images are (B, 3, H, W) uint8. Read next: gap.py.
"""

import torch
from torch import Tensor

from mra.diffusion.autoencoder import OPPONENT, Autoencoder
from mra.diffusion.base import decode, encode, to_bytes, to_float
from mra.diffusion.sampling import transfer_moments

# RGB -> cone responses, whose logarithms OPPONENT makes nearly independent (Reinhard et al. 2001)
LMS = torch.tensor([[0.3811, 0.5783, 0.0402], [0.1967, 0.7244, 0.0782], [0.0241, 0.1288, 0.8444]])
LOW = 0.08          # share of the spectrum's height and width: the frequencies whose amplitudes FDA swaps


def mix(matrix: Tensor, x: Tensor) -> Tensor:
    """Multiply the colour of each pixel of images (B, 3, H, W) by a matrix (3, 3)."""
    return torch.einsum("ij,bjhw->bihw", matrix.to(x), x)


def reinhard(images: Tensor, targets: Tensor) -> Tensor:
    """Each image's mean and standard deviation in the log opponent space become its target's (Reinhard et al. 2001)."""
    def to_opponent(x: Tensor) -> Tensor:
        return mix(OPPONENT, (mix(LMS, (to_float(x) + 1) / 2) + 1 / 255).log())

    x = to_opponent(images)
    std, mean = torch.std_mean(x, (2, 3), keepdim=True)
    target_std, target_mean = torch.std_mean(to_opponent(targets), (2, 3), keepdim=True)
    moved = (x - mean) / std.clamp(min=1e-4) * target_std + target_mean
    return to_bytes(mix(LMS.inverse(), mix(OPPONENT.inverse(), moved).exp() - 1 / 255) * 2 - 1)


def histogram(images: Tensor, targets: Tensor) -> Tensor:
    """Each channel of an image gets the values of its target's channel, rank by rank."""
    values = targets.flatten(2).sort(-1).values
    ranks = images.flatten(2).argsort(dim=-1, stable=True).argsort(-1)
    return values.gather(-1, ranks).view_as(images)


def fourier(images: Tensor, targets: Tensor) -> Tensor:
    """FDA: the amplitudes of the lowest frequencies become the target's; phases stay (Yang & Soatto 2020)."""
    x, y = (torch.fft.fftshift(torch.fft.fft2(some.float()), dim=(2, 3)) for some in (images, targets))
    low = []
    for size in x.shape[2:]:
        reach = max(1, round(LOW * size))
        low.append(slice(size // 2 - reach, size // 2 + reach + 1))
    rows, columns = low
    amplitude = x.abs()
    amplitude[:, :, rows, columns] = y.abs()[:, :, rows, columns]
    back = torch.fft.ifft2(torch.fft.ifftshift(torch.polar(amplitude, x.angle()), dim=(2, 3))).real
    return back.round().clamp(0, 255).to(torch.uint8)


def moments(images: Tensor, targets: Tensor, autoencoder: Autoencoder) -> Tensor:
    """The latents of all images together get the moments of the latents of all targets (M, 3, H, W)."""
    latents = encode(autoencoder, images)                                                # (B, C, h, w)
    moved = transfer_moments(latents, latents, encode(autoencoder, targets))
    return decode(autoencoder, moved, torch.Generator(moved.device).manual_seed(0)).cpu()


def transferred(images: Tensor, targets: Tensor, autoencoder: Autoencoder) -> dict[str, Tensor]:
    """The images (B, 3, H, W) in the look of the targets (M, 3, H, W), by the name of each transfer."""
    draw = torch.Generator().manual_seed(0)
    donors = targets[torch.randint(len(targets), (len(images),), generator=draw)]
    return {"reinhard": reinhard(images, donors), "histogram": histogram(images, donors),
            "fourier": fourier(images, donors), "moments": moments(images, targets, autoencoder)}
