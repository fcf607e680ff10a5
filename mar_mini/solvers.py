"""From noise to a token: ways to walk back along the diffusion.

Each takes the network as `denoise(x, i)`, its output at the i-th of the diffusion's timesteps, and
walks from the last timestep to 0. `ddpm` is what MAR publishes. The other two follow the
deterministic path of the same model, in fewer steps; they start at t = 980 and not at 999, where a
small error of the predicted noise would decide the whole path (see `mar_mini.diffusion`).
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from mar_mini.diffusion import NUM_TIMESTEPS, Diffusion

Denoise = Callable[[Tensor, int], Tensor]  # (x (N, C), index of a timestep) -> output (N, 2C)
Draw = Callable[[], Tensor]  # -> standard normal noise (N, C)


def ddpm(
    denoise: Denoise, diffusion: Diffusion, draw: Draw, temperature: float, clip: float | None
) -> Float[Tensor, "N C"]:
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


def ddim(
    denoise: Denoise, diffusion: Diffusion, draw: Draw, temperature: float, clip: float | None
) -> Float[Tensor, "N C"]:
    """The deterministic path with straight steps (Song et al. 2021, DDIM, eq. 12 with sigma = 0).

    temperature  scale of the initial noise, the only one there is
    """
    x = temperature * draw()  # (N, C)
    for t in reversed(range(diffusion.num_steps)):
        x0 = diffusion.p_mean_variance(denoise(x, t), x, t, clip).x0  # (N, C)
        signal, noise, next_signal, next_noise = levels(diffusion, t)
        x = next_signal * x0 + next_noise / noise * (x - signal * x0)  # (N, C)
    return x


def dpm_solver(
    denoise: Denoise, diffusion: Diffusion, draw: Draw, temperature: float, clip: float | None
) -> Float[Tensor, "N C"]:
    """The deterministic path with curved steps: DPM-Solver++ (2M) (Lu et al. 2022, algorithm 2).

    Instead of taking x0 as constant during a step it continues the line through the last two.

    temperature  scale of the initial noise, the only one there is
    """
    x, previous = temperature * draw(), None  # (N, C)
    log_snr = torch.log(diffusion.sqrt_alpha_bars / diffusion.sqrt_one_minus_alpha_bars)
    for t in reversed(range(diffusion.num_steps)):
        x0 = diffusion.p_mean_variance(denoise(x, t), x, t, clip).x0  # (N, C)
        signal, noise, next_signal, next_noise = levels(diffusion, t)
        ahead = x0  # (N, C)
        if previous is not None and t > 1:  # the last step is long: no line is continued so far
            step, last_step = log_snr[t - 1] - log_snr[t], log_snr[t] - log_snr[t + 1]
            ahead = x0 + float(step / last_step / 2) * (x0 - previous)  # (N, C)
        shrink = next_noise / noise
        x = shrink * x + (next_signal - shrink * signal) * ahead  # (N, C)
        previous = x0
    return x


def levels(diffusion: Diffusion, t: int) -> tuple[float, float, float, float]:
    """Scale of signal and of noise at the t-th timestep, and after the step that follows."""
    signal, noise = diffusion.sqrt_alpha_bars, diffusion.sqrt_one_minus_alpha_bars
    after = (float(signal[t - 1]), float(noise[t - 1])) if t > 0 else (1.0, 0.0)
    return float(signal[t]), float(noise[t]), *after


SOLVERS = {"ddpm": ddpm, "ddim": ddim, "dpm_solver": dpm_solver}
FIRST_TIMESTEP = {"ddpm": NUM_TIMESTEPS - 1, "ddim": 980, "dpm_solver": 980}
