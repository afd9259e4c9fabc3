"""The autoencoder in whose latents the diffusion works (Rombach et al. 2022): convolutions and a KL term.

Latents are scaled to mean 0 and variance 1 a channel, first on the source, then on the target. Read next: denoiser.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mra.config import DiffusionConfig

KL_WEIGHT, GRAIN_WEIGHT = 1e-4, 0.02        # w and u of the losses below
# RGB -> orthonormal axes: lightness, yellow-blue, red-green (Ruderman et al. 1998)
OPPONENT = torch.tensor([[3**-0.5] * 3, [6**-0.5, 6**-0.5, -2 * 6**-0.5], [2**-0.5, -(2**-0.5), 0.0]])


class ResBlock(nn.Module):
    """Two 3x3 convolutions beside a skip; norms and the embedding between the convolutions are optional."""

    def __init__(self, dim_in: int, dim_out: int, embedding: int = 0, norm1: nn.Module | None = None,
                 norm2: nn.Module | None = None):
        super().__init__()
        self.norm1 = norm1 or nn.Identity()
        self.conv1 = nn.Conv2d(dim_in, dim_out, 3, padding=1)
        if embedding:
            self.modulation = nn.Linear(embedding, dim_out)
        self.norm2 = norm2 or nn.Identity()
        self.conv2 = nn.Conv2d(dim_out, dim_out, 3, padding=1)
        self.skip = nn.Conv2d(dim_in, dim_out, 1) if dim_in != dim_out else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """Features (B, C, h, w) and an embedding (B, D) -> features (B, C', h, w)."""
        h = self.conv1(F.silu(self.norm1(x)))                                            # (B, C', h, w)
        if embedding is not None:
            h = h + self.modulation(F.silu(embedding))[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))                          # (B, C', h, w)


def group_norm(dim: int, least: int = 1, eps: float = 1e-6) -> nn.GroupNorm:
    """32 groups of channels, or fewer, so that each group has at least `least` channels."""
    groups = next(count for count in (32, 16, 8, 4, 2, 1) if dim % count == 0 and dim // count >= least)
    return nn.GroupNorm(groups, dim, eps)


def zero(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def upsample(dim: int) -> nn.Sequential:
    """Twice the resolution: nearest neighbour, then a convolution."""
    return nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(dim, dim, 3, padding=1))


class Autoencoder(nn.Module):
    """Images (B, 3, H, W) in -1..1 <-> scaled latents (B, C, h, w), h = H / factor.

    Encoder and decoder are each the sum of a network and a linear map. The linear maps start as the principal
    components of patches; the networks learn what these miss. The decoder also predicts the grain, which is its own
    mean error at each pixel: latents cannot hold grain, and an image without it is easily told from a photograph.
    """

    def __init__(self, config: DiffusionConfig):
        super().__init__()
        widths, stem, latent, factor = config.autoencoder, config.stem, config.latent, config.factor
        self.factor, first, lowest = factor, widths[0], widths[-1]
        encoder = [nn.PixelUnshuffle(stem), nn.Conv2d(3 * stem**2, first, 3, padding=1), ResBlock(first, first)]
        for above, here in zip(widths, widths[1:]):
            encoder += [nn.Conv2d(above, here, 3, stride=2, padding=1), ResBlock(here, here)]
        encoder += [ResBlock(lowest, lowest), nn.SiLU(), nn.Conv2d(lowest, 2 * latent, 3, padding=1)]
        decoder = [nn.Conv2d(latent, lowest, 3, padding=1), ResBlock(lowest, lowest), ResBlock(lowest, lowest)]
        for below, here in zip(widths[::-1], widths[-2::-1]):
            decoder += [upsample(below), nn.Conv2d(below, here, 1), ResBlock(here, here)]
        decoder += [nn.SiLU(), nn.Conv2d(first, 6 * stem**2, 3, padding=1), nn.PixelShuffle(stem)]
        self.encoder, self.decoder = nn.Sequential(*encoder), nn.Sequential(*decoder)
        self.linear_in = nn.Sequential(nn.PixelUnshuffle(factor), nn.Conv2d(3 * factor**2, latent, 1))
        self.linear_out = nn.Sequential(nn.Conv2d(latent, 3 * factor**2, 1), nn.PixelShuffle(factor))
        self.register_buffer("mean", torch.zeros(latent))
        self.register_buffer("std", torch.ones(latent))

    @torch.no_grad()
    def start(self, images: Tensor) -> None:
        """Set the linear maps to the principal components of the patches of images (B, 3, H, W), with variance 1."""
        (_, to_latent), (to_patch, _) = self.linear_in, self.linear_out
        patches = self.linear_in[0](images).transpose(0, 1).flatten(1)                            # (3 f^2, B*h*w)
        values, vectors = torch.linalg.eigh(patches.double().cov())
        middle, count = patches.double().mean(1), to_latent.out_channels
        scale, axes = values[-count:].clamp(min=1e-6).sqrt(), vectors[:, -count:]                 # (C,), (3 f^2, C)
        to_latent.weight.copy_((axes / scale).T[:, :, None, None])
        to_latent.bias.copy_(-(middle @ axes) / scale)
        to_patch.weight.copy_((axes * scale)[:, :, None, None])
        to_patch.bias.copy_(middle)
        for last in [self.encoder[-1], self.decoder[-2], *(m.conv2 for m in self.modules() if isinstance(m, ResBlock))]:
            zero(last)
        self.encoder[-1].bias[count:] = -6.0        # the latents' log-variance: little noise at first

    def posterior(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (B, C, h, w) of an image's latents before scaling."""
        mean, log_variance = self.encoder(image).chunk(2, 1)
        return mean + self.linear_in(image), log_variance.clamp(-12, 0)

    def picture(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Latents -> the image (B, 3, H, W), and the log of its grain on each OPPONENT axis."""
        z = latents * self.std[:, None, None] + self.mean[:, None, None]
        missed, log_grain = self.decoder(z).chunk(2, 1)
        return self.linear_out(z) + missed, (log_grain - 4).clamp(-5.5, 0)      # at first e^-4; e^-5.5: half a level

    def encode(self, image: Tensor) -> Tensor:
        """The mean latents of an image."""
        mean, _ = self.posterior(image)
        return (mean - self.mean[:, None, None]) / self.std[:, None, None]

    def decode(self, latents: Tensor, noise: Tensor | None = None) -> Tensor:
        """The image of latents; standard normal `noise` (B, 3, H, W) becomes its grain.

        The grain's standard deviation is the mean error b. A normal distribution with mean size b would have 1.25 b,
        but part of the error lies along edges, where that would show as speckles.
        """
        image, log_grain = self.picture(latents)
        if noise is None:
            return image
        return image + torch.einsum("ij,bihw->bjhw", OPPONENT.to(image), noise * log_grain.exp())

    def loss(self, image: Tensor, noise: Tensor) -> Tensor:
        """L = L_decoder(x, z) + w KL(q(z | x) || N(0, 1)), z = mean + std * noise (B, C, h, w); a scalar."""
        mean, log_variance = (x.float() for x in self.posterior(image))     # the scale is learned after training
        divergence = (mean**2 + log_variance.exp() - 1 - log_variance).mean() / 2
        return self.decoder_loss(image, mean + (log_variance / 2).exp() * noise) + KL_WEIGHT * divergence

    def decoder_loss(self, image: Tensor, latents: Tensor) -> Tensor:
        """L_decoder = |r| + u (|r'| / b + log b) of images and their latents; a scalar.

        r = x - picture(z), and r' is r on the OPPONENT axes, without gradient. Only the grain b learns from r': the
        likelihood of a Laplace distribution is largest where b is the mean of |r'|.
        """
        rebuilt, log_grain = (x.float() for x in self.picture(latents))
        off = torch.einsum("ij,bjhw->bihw", OPPONENT.to(image), (image - rebuilt).detach()).abs()
        return (rebuilt - image).abs().mean() + GRAIN_WEIGHT * (off * (-log_grain).exp() + log_grain).mean()

    @torch.no_grad()
    def learn_scale(self, latents: Tensor) -> None:
        """Scale so that the images of these latents (B, C, h, w) get mean 0 and variance 1 in each channel."""
        std, mean = torch.std_mean(latents.float(), (0, 2, 3))
        self.mean += self.std * mean
        self.std *= std
