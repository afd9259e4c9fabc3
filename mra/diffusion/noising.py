"""The noise schedule, the diffusion loss and two samplers side by side.

Latents z_0 are noised to z_t = alpha_t z_0 + sigma_t e, with alpha_t^2 + sigma_t^2 = 1. The denoiser learns
v = alpha_t e - sigma_t z_0 (Salimans & Ho 2022). Our schedule has zero terminal SNR (Lin et al. 2024): alpha ends at 0.
If some signal were left, no image could be very dark or very bright. Read next: autoencoder.py, denoiser.py.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]    # latents (B, C, h, w), t (B,) -> v or e


@dataclass(frozen=True)
class Schedule:
    """alpha and sigma (K,) of the noise levels t = 0 (almost clean) to K - 1 (pure noise, or nearly)."""
    alpha: Tensor
    sigma: Tensor
    predicts_noise: bool = False        # the denoiser learns the noise e in place of v

    @staticmethod
    def cosine() -> "Schedule":
        """alpha_t = cos(pi/2 (t + 1) / K): Nichol & Dhariwal (2021) without their offset, so alpha is 0 at the end."""
        angle = torch.linspace(0, torch.pi / 2, 1001, dtype=torch.float64)[1:]
        alpha = angle.cos()
        alpha[-1] = 0.0
        return Schedule(alpha.float(), (1 - alpha**2).sqrt().float())

    @staticmethod
    def scaled_linear() -> "Schedule":
        """Stable Diffusion's: alpha_t^2 = product of 1 - beta; sqrt(beta) rises linearly, to beta = 0.012."""
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
        alpha = (1 - betas).cumprod(0).sqrt()
        return Schedule(alpha.float(), (1 - alpha**2).sqrt().float(), predicts_noise=True)

    def at(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t of t (B,), in a shape that multiplies `like` (B, ...)."""
        shape = -1, *[1] * (like.ndim - 1)
        return tuple(x.to(like.device)[t].view(shape) for x in (self.alpha, self.sigma))

    def truth(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What a denoiser should predict from noised latents: v or the noise (B, ...)."""
        alpha, sigma = self.at(t, latents)
        return noise if self.predicts_noise else alpha * noise - sigma * latents

    def random_levels(self, count: int, generator: torch.Generator, logit_normal: bool = False) -> Tensor:
        """Random levels t (count,), a low-discrepancy sample: the loss varies less (Kingma et al. 2021, appendix I.1).

        They are uniform or `logit_normal`: then more are in the middle, where shapes are decided (Esser et al. 2024).
        """
        device = generator.device
        spread = (torch.rand(1, generator=generator, device=device) + torch.arange(count, device=device) / count) % 1
        if logit_normal:
            spread = torch.special.ndtri(spread).sigmoid()
        return (spread * len(self.alpha)).long().clamp(max=len(self.alpha) - 1)

    def trailing(self, steps: int, strength: float = 1.0) -> list[int]:
        """The levels that a sampler visits, from K - 1 down in `steps` even steps (Lin et al. 2024, "trailing").

        With strength s < 1 only the last s * steps of them are visited: at least one, but none at 0.
        """
        levels = [round(len(self.alpha) * (steps - i) / steps) - 1 for i in range(steps)]
        visited = max(1, round(strength * steps)) if strength else 0
        return levels[steps - visited:]


def q_sample(latents: Tensor, noise: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """z_t = alpha_t z_0 + sigma_t e: latents and noise (B, ...), t (B,)."""
    alpha, sigma = schedule.at(t, latents)
    return alpha * latents + sigma * noise


def diffusion_loss(denoise: Denoise, latents: Tensor, noise: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """L = E |v(z_t, t) - v|^2 with v = alpha_t e - sigma_t z_0, or E |e(z_t, t) - e|^2; a scalar."""
    error = denoise(q_sample(latents, noise, t, schedule), t).float() - schedule.truth(latents, noise, t)
    return error.square().mean()


def ddim(denoise: Denoise, noise: Tensor, schedule: Schedule, steps: int) -> Tensor:
    """DDIM (Song et al. 2021), deterministic: from noise to clean latents (B, C, h, w)."""
    z, visited = noise, schedule.trailing(steps)
    for level, following in zip(visited, [*visited[1:], None]):
        clean, noise = predict(denoise, z, level, schedule)
        z = clean if following is None else schedule.alpha[following] * clean + schedule.sigma[following] * noise
    return z


def dpm_solver(denoise: Denoise, noise: Tensor, schedule: Schedule, steps: int, strength: float = 1.0) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): as `ddim`, but clean latents are extrapolated from two steps.

    With strength < 1, `noise` is latents at level schedule.trailing(steps, strength)[0]; at 0 it is returned unchanged.

    z_s = sigma_s/sigma_t z + (alpha_s - alpha_t sigma_s/sigma_t) D,  D = D_t + (D_t - D_before) h / (2 h_before);
    h is the step in log(alpha/sigma). From pure noise h is infinite, so that the second step is first-order too.
    """
    z, before = noise, None
    visited = schedule.trailing(steps, strength)
    half_log_snr = (schedule.alpha.double() / schedule.sigma.double()).log()                     # (K,), -inf at its end
    for i, level in enumerate(visited):
        clean, _ = predict(denoise, z, level, schedule)
        if i + 1 == len(visited):
            return clean
        following, estimate = visited[i + 1], clean
        if i > 0:
            step = half_log_snr[following] - half_log_snr[level]
            last_step = half_log_snr[level] - half_log_snr[visited[i - 1]]
            estimate = clean + (clean - before) * float(step / last_step / 2)               # / inf: first-order
        ratio = schedule.sigma[following] / schedule.sigma[level]
        z = ratio * z + (schedule.alpha[following] - schedule.alpha[level] * ratio) * estimate
        before = clean
    return z        # strength 0: no level is visited


def predict(denoise: Denoise, z: Tensor, level: int, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """Split z at `level` into clean latents and noise, by what the denoiser predicts."""
    predicted = denoise(z, torch.full((len(z),), level, device=z.device)).float()
    alpha, sigma = schedule.alpha[level], schedule.sigma[level]
    if schedule.predicts_noise:
        return (z - sigma * predicted) / alpha, predicted
    return alpha * z - sigma * predicted, sigma * z + alpha * predicted
