"""The convolutional autoencoder with a KL term that the diffusion works in the latents of (Rombach et al. 2022).

It owns the scale of its latents: `encode` returns them with mean 0 and variance 1 in each channel over the images
that `learn_scale` was last given, the source's and then the target's; `decode` takes them so.
Before: nothing. After: denoiser.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mra.config import DiffusionConfig
from mra.layers import Attention

# RGB -> orthonormal axes: lightness, yellow-blue, red-green (Ruderman et al. 1998)
OPPONENT = torch.tensor([[3**-0.5] * 3, [6**-0.5, 6**-0.5, -2 * 6**-0.5], [2**-0.5, -(2**-0.5), 0.0]])
START_LOG_VARIANCE = -6.0       # of the latents: little noise before the loss has its say
STABLE_SCALE = 0.18215          # makes the variance of Stable Diffusion's latents 1


class ResBlock(nn.Module):
    """Two 3x3 convolutions beside a skip; with an embedding (B, T), normalised, and it is added between them.

    With `eps`, that of its norms, the block is Stable Diffusion's: always normalised, in as many groups both times.
    """

    def __init__(self, dim_in: int, dim_out: int, embedding: int = 0, eps: float = 0.0):
        super().__init__()
        normed, least = embedding or eps, 1 if eps else 8       # of channels in a group of the second norm
        self.norm1 = group_norm(dim_in, 1, eps or 1e-6) if normed else nn.Identity()
        self.conv1 = nn.Conv2d(dim_in, dim_out, 3, padding=1)
        if embedding:
            self.modulation = nn.Linear(embedding, dim_out)
        # a norm over few channels would take away what the embedding adds to them
        self.norm2 = group_norm(dim_out, least, eps or 1e-6) if normed else nn.Identity()
        self.conv2 = nn.Conv2d(dim_out, dim_out, 3, padding=1)
        self.skip = nn.Conv2d(dim_in, dim_out, 1) if dim_in != dim_out else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        if embedding is not None:
            h = h + self.modulation(F.silu(embedding))[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


def group_norm(dim: int, least: int = 1, eps: float = 1e-6) -> nn.GroupNorm:
    """32 groups of channels, or fewer where a group would have less than `least`."""
    return nn.GroupNorm(next(g for g in (32, 16, 8, 4, 2, 1) if dim % g == 0 and dim // g >= least), dim, eps)


def zero(module: nn.Module) -> nn.Module:
    """The module with all parameters 0."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def upsample(dim: int) -> nn.Sequential:
    """Twice the resolution: nearest neighbour, then a convolution."""
    return nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(dim, dim, 3, padding=1))


def mix(matrix: Tensor, x: Tensor) -> Tensor:
    """Images (B, 3, H, W) with new channels, each a sum of the old ones with the weights in a row of the matrix."""
    return torch.einsum("ij,bjhw->bihw", matrix.to(x), x)


class Autoencoder(nn.Module):
    """Images (B, 3, H, W) in -1..1 <-> latents (B, C, h, w) with h = H / factor, mean 0 and variance 1.

    Beside each network runs a linear map, of patches to latents and back, that starts as their principal components;
    the networks learn what it misses. The decoder also says how far it may be off at each pixel, the image's grain:
    what no latent can hold, and a photograph without it is easily told from a real one.
    """

    def __init__(self, config: DiffusionConfig):
        super().__init__()
        widths, stem, latent, factor = config.autoencoder, config.stem, config.latent, config.factor
        self.factor = factor
        encoder = [nn.PixelUnshuffle(stem), nn.Conv2d(3 * stem**2, widths[0], 3, padding=1)]
        decoder = [nn.Conv2d(latent, widths[-1], 3, padding=1), ResBlock(widths[-1], widths[-1])]
        for here, below in zip(widths, [*widths[1:], None]):
            encoder += [ResBlock(here, here)]
            encoder += [nn.Conv2d(here, below, 3, stride=2, padding=1)] if below else []
        for here, above in zip(widths[::-1], [*widths[-2::-1], None]):
            decoder += [ResBlock(here, here)]
            decoder += [upsample(here), nn.Conv2d(here, above, 1)] if above else []
        encoder += [ResBlock(widths[-1], widths[-1]), nn.SiLU(), nn.Conv2d(widths[-1], 2 * latent, 3, padding=1)]
        decoder += [nn.SiLU(), nn.Conv2d(widths[0], 6 * stem**2, 3, padding=1), nn.PixelShuffle(stem)]
        self.encoder, self.decoder = nn.Sequential(*encoder), nn.Sequential(*decoder)
        self.linear_in = nn.Sequential(nn.PixelUnshuffle(factor), nn.Conv2d(3 * factor**2, latent, 1))
        self.linear_out = nn.Sequential(nn.Conv2d(latent, 3 * factor**2, 1), nn.PixelShuffle(factor))
        self.register_buffer("mean", torch.zeros(latent))
        self.register_buffer("std", torch.ones(latent))

    @torch.no_grad()
    def start(self, images: Tensor) -> None:
        """Start as the principal components of the patches of images (B, 3, H, W), each with variance 1."""
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
        self.encoder[-1].bias[count:] = START_LOG_VARIANCE

    def posterior(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (B, C, h, w) of an image's latents before scaling."""
        mean, log_variance = self.encoder(image).chunk(2, 1)
        return mean + self.linear_in(image), log_variance.clamp(-12, 0)

    def picture(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Latents before scaling -> the image (B, 3, H, W), and the log of its grain's size on each OPPONENT axis."""
        missed, grain = self.decoder(z).chunk(2, 1)
        return self.linear_out(z) + missed, (grain - 4).clamp(-5.5, 0)     # small at first; at least half an 8-bit step

    def encode(self, image: Tensor) -> Tensor:
        """The mean latents of an image, scaled."""
        mean, _ = self.posterior(image)
        return (mean - self.mean[:, None, None]) / self.std[:, None, None]

    def unscaled(self, latents: Tensor) -> Tensor:
        """Latents as `picture` takes them, from what `encode` returns."""
        return latents * self.std[:, None, None] + self.mean[:, None, None]

    def decode(self, latents: Tensor, noise: Tensor | None = None) -> Tensor:
        """The image of scaled latents, with grain where its `noise` (B, 3, H, W), standard normal, is given.

        Its standard deviation is b, less than the 1.25 b of a normal distribution whose mean size is b: a part of
        what the image misses lies along edges, where noise would show as speckles.
        """
        image, grain = self.picture(self.unscaled(latents))
        if noise is None:
            return image
        return image + torch.einsum("ij,bihw->bjhw", OPPONENT.to(image), noise * grain.exp())

    def loss(self, image: Tensor, noise: Tensor, kl_weight: float) -> Tensor:
        """L = L_decoder(x, z) + w KL(q(z | x) || N(0, 1)), z = mean + std * noise (B, C, h, w); a scalar."""
        mean, log_variance = (x.float() for x in self.posterior(image))
        divergence = (mean**2 + log_variance.exp() - 1 - log_variance).mean() / 2
        return self.decoder_loss(image, mean + (log_variance / 2).exp() * noise) + kl_weight * divergence

    def decoder_loss(self, image: Tensor, z: Tensor, grain_weight: float = 0.02) -> Tensor:
        """L_decoder = |r| + u (|r'| / b + log b) of an image and its latents before scaling; a scalar.

        r = x - picture(z). r', the same on OPPONENT axes and without gradient, is what the grain b is learned from:
        the likelihood of a Laplace distribution, largest where b is the mean of |r'|.
        """
        rebuilt, grain = (x.float() for x in self.picture(z))
        off = mix(OPPONENT, (image - rebuilt).detach()).abs()
        return (rebuilt - image).abs().mean() + grain_weight * (off * (-grain).exp() + grain).mean()

    @torch.no_grad()
    def learn_scale(self, latents: Tensor) -> None:
        """Make images that `encode` to these latents (B, C, h, w) have mean 0 and variance 1 from now on."""
        std, mean = torch.std_mean(latents.float(), (0, 2, 3))
        self.mean += self.std * mean
        self.std *= std


class PixelAttention(nn.Module):
    """Pixels (B, C, h, w) attend to each other, with one head; added to what came in."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm, self.attention = group_norm(dim), Attention(dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.attention(self.norm(x).flatten(2).transpose(1, 2))                      # (B, h*w, C)
        return x + tokens.transpose(1, 2).reshape(x.shape)


class StableAutoencoder(nn.Module):
    """Stable Diffusion's (Rombach et al. 2022, KL-f8): images (B, 3, H, W) in -1..1 <-> latents (B, 4, H/8, W/8).

    Two blocks a level down, three up; between them a block, attention, a block. It adds no grain.
    """

    def __init__(self, config: DiffusionConfig):
        super().__init__()
        widths, latent, lowest = config.autoencoder, config.latent, config.autoencoder[-1]
        self.factor = config.factor

        def block(dim_in: int, dim: int) -> ResBlock:
            return ResBlock(dim_in, dim, eps=1e-6)

        def last(dim: int, dim_out: int) -> nn.Sequential:
            return nn.Sequential(group_norm(dim), nn.SiLU(), nn.Conv2d(dim, dim_out, 3, padding=1))

        down = nn.Sequential(*(nn.Sequential(block(above, dim), block(dim, dim))
                               for above, dim in zip((widths[0], *widths), widths)))
        up = nn.Sequential(*(nn.Sequential(block(below, dim), block(dim, dim), block(dim, dim))
                             for below, dim in zip((lowest, *widths[::-1]), widths[::-1])))
        for below, above, dim, other in zip(down, up, widths[:-1], widths[:0:-1]):
            below.extend([nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2)])
            above.append(upsample(other))
        middles = [nn.Sequential(block(lowest, lowest), PixelAttention(lowest), block(lowest, lowest))
                   for _ in range(2)]
        self.encoder = nn.Sequential(nn.Conv2d(3, widths[0], 3, padding=1), down, middles[0],
                                     last(lowest, 2 * latent), nn.Conv2d(2 * latent, 2 * latent, 1))
        self.decoder = nn.Sequential(nn.Conv2d(latent, latent, 1), nn.Conv2d(latent, lowest, 3, padding=1), middles[1],
                                     up, last(widths[0], 3))

    def encode(self, image: Tensor) -> Tensor:
        """The mean latents of an image, scaled."""
        mean, _ = self.encoder(image).chunk(2, 1)
        return STABLE_SCALE * mean

    def decode(self, latents: Tensor, _: Tensor | None = None) -> Tensor:
        """The image of scaled latents; the noise that `Autoencoder` makes grain of is not used."""
        return self.decoder(latents / STABLE_SCALE)


def random_light(image: Tensor, generator: torch.Generator) -> Tensor:
    """Images (B, 3, H, W) in -1..1, three in four under a random light, cast, haze and grain that no domain has.

    The autoencoder learns from these, so that it can write pictures of any exposure without having seen a target.
    """
    def uniform(low: float, high: float, channels: int = 1) -> Tensor:
        return low + (high - low) * torch.rand(len(image), channels, 1, 1, generator=generator, device=image.device)

    x = (image + 1) / 2
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * 2 ** uniform(-1.5, 0.3)
    x = (x * 2 ** (uniform(-2.2, 0.8) + uniform(-0.6, 0.6, 3))).clamp(0, 1) ** 2 ** uniform(-0.5, 0.5)
    haze = uniform(-0.1, 0.2).clamp(min=0)
    grain = torch.randn(x.shape, generator=generator, device=x.device) * uniform(-0.02, 0.05).clamp(min=0)
    lit = ((haze + (1 - haze) * x + grain) * 2 - 1).clamp(-1, 1)
    return torch.where(uniform(0, 1) < 0.75, lit, image)
