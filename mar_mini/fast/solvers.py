"""Further ways from noise to a token: pass one as `solver=`."""

import torch
from jaxtyping import Float
from torch import Tensor

from mar_mini.diffusion import Denoise, Diffusion, Draw, levels


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
