"""The convolutional autoencoder with a KL term that the diffusion works in the latents of (Rombach et al. 2022).

It owns the scale of its latents: `encode` returns them with mean 0 and variance 1 in each channel over the images
it was trained on, `decode` takes them so. Before: nothing. After: denoiser.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mra.config import DiffusionConfig


class ResBlock(nn.Module):
    """Two normalised 3x3 convolutions beside a skip; an embedding (B, T), where there is one, is added between them."""

    def __init__(self, dim_in: int, dim_out: int, embedding: int = 0):
        super().__init__()
        least = 8 if embedding else 1    # a norm over one channel would take away what the embedding adds to it
        self.norm1, self.conv1 = group_norm(dim_in), nn.Conv2d(dim_in, dim_out, 3, padding=1)
        if embedding:
            self.modulation = nn.Linear(embedding, dim_out)
        self.norm2, self.conv2 = group_norm(dim_out, least), nn.Conv2d(dim_out, dim_out, 3, padding=1)
        self.skip = nn.Conv2d(dim_in, dim_out, 1) if dim_in != dim_out else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        if embedding is not None:
            h = h + self.modulation(F.silu(embedding))[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


def group_norm(dim: int, least: int = 1) -> nn.GroupNorm:
    """32 groups of channels, or fewer where a group would have less than `least`."""
    return nn.GroupNorm(next(g for g in (32, 16, 8, 4, 2, 1) if dim % g == 0 and dim // g >= least), dim, eps=1e-6)


class Up(nn.Sequential):
    """Twice the resolution: nearest neighbour, then a convolution."""

    def __init__(self, dim: int):
        super().__init__(nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(dim, dim, 3, padding=1))


class Autoencoder(nn.Module):
    """Images (B, 3, H, W) in -1..1 <-> latents (B, C, h, w) with h = H / factor, mean 0 and variance 1."""

    def __init__(self, config: DiffusionConfig):
        super().__init__()
        widths, stem, latent = config.autoencoder, config.stem, config.latent
        encoder = [nn.PixelUnshuffle(stem), nn.Conv2d(3 * stem**2, widths[0], 3, padding=1)]
        decoder = [nn.Conv2d(latent, widths[-1], 3, padding=1), ResBlock(widths[-1], widths[-1])]
        for here, below in zip(widths, [*widths[1:], None]):
            encoder += [ResBlock(here, here)]
            encoder += [nn.Conv2d(here, below, 3, stride=2, padding=1)] if below else []
        for here, above in zip(widths[::-1], [*widths[-2::-1], None]):
            decoder += [ResBlock(here, here)]
            decoder += [Up(here), nn.Conv2d(here, above, 1)] if above else []
        encoder += [ResBlock(widths[-1], widths[-1]), group_norm(widths[-1]), nn.SiLU(),
                    nn.Conv2d(widths[-1], 2 * latent, 3, padding=1)]
        decoder += [group_norm(widths[0]), nn.SiLU(), nn.Conv2d(widths[0], 3 * stem**2, 3, padding=1),
                    nn.PixelShuffle(stem)]
        self.encoder, self.decoder = nn.Sequential(*encoder), nn.Sequential(*decoder)
        self.register_buffer("mean", torch.zeros(latent))
        self.register_buffer("std", torch.ones(latent))

    def posterior(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (B, C, h, w) of an image's latents before scaling."""
        return self.encoder(image).chunk(2, 1)

    def encode(self, image: Tensor) -> Tensor:
        """The mean latents of an image, scaled."""
        mean, _ = self.posterior(image)
        return (mean - self.mean[:, None, None]) / self.std[:, None, None]

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(latents * self.std[:, None, None] + self.mean[:, None, None])

    def loss(self, image: Tensor, noise: Tensor, kl_weight: float) -> Tensor:
        """L = |x - decode(z)| + w KL(q(z | x) || N(0, 1)), z = mean + std * noise (B, C, h, w); a scalar."""
        mean, log_variance = (x.float() for x in self.posterior(image))
        log_variance = log_variance.clamp(-30, 20)
        rebuilt = self.decoder(mean + (log_variance / 2).exp() * noise)
        divergence = (mean**2 + log_variance.exp() - 1 - log_variance).mean() / 2
        return (rebuilt.float() - image).abs().mean() + kl_weight * divergence

    @torch.no_grad()
    def learn_scale(self, images: Tensor) -> None:
        """Set mean and std (C,) from the latents of these images (B, 3, H, W)."""
        mean, _ = self.posterior(images)
        self.mean.copy_(mean.float().mean((0, 2, 3)))
        self.std.copy_(mean.float().std((0, 2, 3)))


def random_light(image: Tensor, generator: torch.Generator) -> Tensor:
    """Images (B, 3, H, W) in -1..1, three in four under a random light, cast, haze and grain that no domain has.

    The autoencoder learns from these, so that it can write pictures of any exposure without having seen a target.
    """
    def uniform(low: float, high: float, channels: int = 1) -> Tensor:
        span = torch.rand(len(image), channels, 1, 1, generator=generator, device=image.device)
        return low + (high - low) * span

    x = (image + 1) / 2
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * 2 ** uniform(-1.5, 0.3)
    x = (x * 2 ** (uniform(-2.2, 0.8) + uniform(-0.6, 0.6, 3))).clamp(0, 1) ** 2 ** uniform(-0.5, 0.5)
    haze = uniform(-0.1, 0.2).clamp(min=0)
    grain = torch.randn(x.shape, generator=generator, device=x.device) * uniform(-0.02, 0.05).clamp(min=0)
    lit = ((haze + (1 - haze) * x + grain) * 2 - 1).clamp(-1, 1)
    return torch.where(uniform(0, 1) < 0.75, lit, image)
