"""Gaussian diffusion: noise schedule, training target and reverse step.

Ho et al. 2020 with the cosine schedule and the learned variance of Nichol & Dhariwal 2021, as MAR
uses them for one token (MAR section 3.2). Tables are float64 and belong to no module: they are
formulas, not weights.

The terminal step. A network predicts the noise, and x0 follows from it as
`x0 = x_t / sqrt(alpha_bar) - sqrt(1 / alpha_bar - 1) * noise`. At t = 999 the cosine schedule has
alpha_bar = 2.4e-9, so an error of the predicted noise enters x0 multiplied by 20,291 (by 34 at
t = 980). A young model's error there is large: one step later the state is far outside of anything
seen in training, and the samples are noise, or black. The cure is a bound on x0 (`clip`): a token
of the training set never leaves a known range, so the predicted one may not either.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

NUM_TIMESTEPS = 1000
DETERMINISTIC_START = 980  # the timestep at which solvers that inject no noise begin

Denoise = Callable[[Tensor, int], Tensor]  # (x (N, C), index of a timestep) -> output (N, 2C)
Draw = Callable[[], Tensor]  # -> standard normal noise (N, C)


def cosine_alpha_bars(num_timesteps: int = NUM_TIMESTEPS) -> Float[Tensor, " T"]:
    """Share of the signal's variance left after each step, float64 (Nichol & Dhariwal, eq. 17)."""
    # on the CPU even where a model is built without memory: these numbers are not loaded later
    u = torch.arange(num_timesteps + 1, dtype=torch.float64, device="cpu") / num_timesteps
    signal = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    betas = (1 - signal[1:] / signal[:-1]).clamp(max=0.999)  # no step removes all
    return (1 - betas).cumprod(0)


@dataclass(frozen=True)
class ReverseStep:
    """p(x_{t-1} | x_t) as the network sees it: mean, log variance and predicted x0, all (N, C)."""

    mean: Tensor
    log_variance: Tensor
    x0: Tensor


class Diffusion:
    """The chain of `num_steps` noise levels, all 1000 of training or fewer of them for sampling.

    num_steps  2 to 1000; the kept timesteps are spread evenly and include 0 and `last`. The
               network is always told the original timestep: `timestep_map[t]`
    last       the noisiest timestep that is kept

    Raises ValueError for another number of steps. Source: Nichol & Dhariwal 2021, section 4.
    """

    def __init__(self, num_steps: int = NUM_TIMESTEPS, last: int = NUM_TIMESTEPS - 1):
        if not 2 <= num_steps <= last + 1:
            raise ValueError(f"num_sampling_steps is {num_steps}; expected 2 to {last + 1}")
        self.num_steps = num_steps
        kept = [round(k * last / (num_steps - 1)) for k in range(num_steps)]
        self.timestep_map = torch.tensor(kept, device="cpu")
        self.alpha_bars = alpha_bars = cosine_alpha_bars()[self.timestep_map]
        previous = torch.cat([alpha_bars.new_ones(1), alpha_bars[:-1]])
        self.betas = betas = 1 - alpha_bars / previous
        # q(x_{t-1} | x_t, x0) is normal with mean coef_x0 * x0 + coef_xt * x_t (Ho et al., eq. 7)
        self.coef_x0 = betas * previous.sqrt() / (1 - alpha_bars)
        self.coef_xt = (1 - previous) * (1 - betas).sqrt() / (1 - alpha_bars)
        self.posterior_variance = variance = betas * (1 - previous) / (1 - alpha_bars)
        # the posterior of the last step has variance 0; its log borrows the neighbour's
        self.posterior_log_variance = torch.cat([variance[1:2], variance[1:]]).log()
        self.log_betas = betas.log()
        self.sqrt_alpha_bars = alpha_bars.sqrt()
        self.sqrt_one_minus_alpha_bars = (1 - alpha_bars).sqrt()
        self.sqrt_recip_alpha_bars = (1 / alpha_bars).sqrt()
        self.noise_gain = (1 / alpha_bars - 1).sqrt()  # by which a noise error enters x0

    @staticmethod
    def at(table: Float[Tensor, " T"], t: int | Int[Tensor, " N"]) -> float | Tensor:
        """Look entries of a table up: a number for one t, a float32 column (N, 1) for many."""
        return float(table[t]) if isinstance(t, int) else table.to(t.device)[t].float()[:, None]

    def q_sample(
        self, x0: Float[Tensor, "N C"], t: Int[Tensor, " N"], noise: Float[Tensor, "N C"]
    ) -> Float[Tensor, "N C"]:
        """Noise clean tokens to level t in one go (Ho et al. 2020, eq. 4)."""
        signal, spread = self.sqrt_alpha_bars, self.sqrt_one_minus_alpha_bars
        return self.at(signal, t) * x0 + self.at(spread, t) * noise

    def posterior_mean(self, x0: Tensor, x_t: Tensor, t: int | Tensor) -> Float[Tensor, "N C"]:
        """Mean of q(x_{t-1} | x_t, x0) (Ho et al. 2020, eq. 7)."""
        return self.at(self.coef_x0, t) * x0 + self.at(self.coef_xt, t) * x_t

    def p_mean_variance(
        self, output: Float[Tensor, "N C2"], x_t: Float[Tensor, "N C"], t, clip: float | None = None
    ) -> ReverseStep:
        """Read the network's output as the reverse step from x_t.

        output  predicted noise, then v, which chooses the log variance between the posterior's
                (v = -1) and log beta (v = 1) (Nichol & Dhariwal 2021, eq. 15)
        t       index into the kept timesteps: an int for all rows, or int64 (N,)
        clip    bound on |x0|; None for none. See the module's text on the terminal step
        """
        noise, v = output.chunk(2, dim=1)
        high, low = self.at(self.log_betas, t), self.at(self.posterior_log_variance, t)
        fraction = (v + 1) / 2
        log_variance = fraction * high + (1 - fraction) * low
        x0 = self.at(self.sqrt_recip_alpha_bars, t) * x_t - self.at(self.noise_gain, t) * noise
        if clip is not None:
            x0 = x0.clamp(-clip, clip)
        return ReverseStep(self.posterior_mean(x0, x_t, t), log_variance, x0)

    def p_sample(self, output, x_t, t, noise, temperature=1.0, clip=None) -> Float[Tensor, "N C"]:
        """Draw x_{t-1} given x_t; further arguments as for `p_mean_variance`.

        noise        (N, C) standard normal, or None for the mean; at t = 0 none is injected
        temperature  scale of the injected noise (MAR section 4)
        """
        step = self.p_mean_variance(output, x_t, t, clip)
        if noise is None:
            return step.mean
        std = torch.exp(0.5 * step.log_variance) * temperature
        if isinstance(t, int):
            return step.mean + std * noise if t > 0 else step.mean
        return step.mean + (t > 0).to(std)[:, None] * std * noise

    def loss(self, output, x0, x_t, t, noise) -> dict[str, Float[Tensor, " N"]]:
        """Training loss of each token: `loss` = `mse` + `vb`.

        mse  mean squared error of the predicted noise over the channels (MAR eq. 1)
        vb   the variational bound's term at t in bits, mean over the channels (Nichol & Dhariwal
             2021, L_vlb). The predicted noise is detached in it: it teaches the variance alone
        """
        predicted, v = output.chunk(2, dim=1)
        mse = (noise - predicted).square().mean(1)
        step = self.p_mean_variance(torch.cat([predicted.detach(), v], dim=1), x_t, t)
        mean, log_variance = (
            self.posterior_mean(x0, x_t, t),
            self.at(self.posterior_log_variance, t),
        )
        kl = normal_kl(mean, log_variance, step.mean, step.log_variance).mean(1)
        nll = discretised_nll(x0, step.mean, 0.5 * step.log_variance).mean(1)
        vb = torch.where(t == 0, nll, kl) / math.log(2)
        return {"loss": mse + vb, "mse": mse, "vb": vb}


def normal_kl(mean1: Tensor, logvar1: Tensor, mean2: Tensor, logvar2: Tensor) -> Tensor:
    """KL(N1 || N2) in nats, element by element."""
    spread, distance = torch.exp(logvar1 - logvar2), (mean1 - mean2) ** 2
    return 0.5 * (-1.0 + logvar2 - logvar1 + spread + distance * torch.exp(-logvar2))


def approximate_normal_cdf(x: Tensor) -> Tensor:
    """Cumulative distribution of the standard normal by a tanh (Page 1977)."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def discretised_nll(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """-log p in nats of x in [-1, 1] in bins of 2/255, the outermost open (Ho et al., sec. 3.3)."""
    centred, inv_std = x - mean, torch.exp(-log_std)
    upper = approximate_normal_cdf(inv_std * (centred + 1 / 255))
    lower = approximate_normal_cdf(inv_std * (centred - 1 / 255))
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return -probability.clamp(min=1e-12).log()


# From noise to a token: each solver takes the network as `denoise(x, i)`, its output at the i-th of
# the diffusion's timesteps, and walks from the last one to 0.


def ddpm(denoise, diffusion, draw, temperature, clip) -> Float[Tensor, "N C"]:
    """Ancestral sampling: at each step a draw from p(x_{t-1} | x_t) (Ho et al. 2020, algorithm 2).

    draw         called once for the initial state and once for each step but the last
    temperature  scale of the noise injected at each step; nothing is drawn for it at 0
    """
    x = draw()  # (N, C)
    for t in reversed(range(diffusion.num_steps)):
        output = denoise(x, t)  # (N, 2C)
        noise = draw() if t > 0 and temperature > 0 else None  # (N, C)
        x = diffusion.p_sample(output, x, t, noise, temperature, clip)  # (N, C)
    return x


def ddim(denoise, diffusion, draw, temperature, clip) -> Float[Tensor, "N C"]:
    """The deterministic path with straight steps (Song et al. 2021, DDIM, eq. 12 with sigma = 0).

    It starts at t = 980 and not at 999, where a small error of the predicted noise would decide
    the whole path. The temperature scales the initial noise, the only one there is.
    """
    x = temperature * draw()  # (N, C)
    for t in reversed(range(diffusion.num_steps)):
        x0 = diffusion.p_mean_variance(denoise(x, t), x, t, clip).x0  # (N, C)
        signal, noise, next_signal, next_noise = levels(diffusion, t)
        x = next_signal * x0 + next_noise / noise * (x - signal * x0)  # (N, C)
    return x


def levels(diffusion: Diffusion, t: int) -> tuple[float, float, float, float]:
    """Scale of signal and of noise at the t-th timestep, and after the step that follows."""
    signal, noise = diffusion.sqrt_alpha_bars, diffusion.sqrt_one_minus_alpha_bars
    after = (float(signal[t - 1]), float(noise[t - 1])) if t > 0 else (1.0, 0.0)
    return float(signal[t]), float(noise[t]), *after


Solver = Callable[[Denoise, Diffusion, Draw, float, float | None], Tensor]
SOLVERS: dict[str, Solver] = {"ddpm": ddpm, "ddim": ddim}
