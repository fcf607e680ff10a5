"""Laws of the noise schedule and the reverse step, and the terminal step's trouble and cure."""

import math

import pytest
import torch

from mar_mini import DiffLoss, Diffusion
from mar_mini.diffusion import discretised_nll, normal_kl


def test_noise_gain_of_the_terminal_step():
    """The numbers that the module's text and the documentation quote."""
    d = Diffusion()
    assert round(float(d.noise_gain[999])) == 20291
    assert round(float(d.noise_gain[980])) == 34
    assert float(d.alpha_bars[999]) == pytest.approx(2.4e-9, rel=0.02)


class AlmostRight(torch.nn.Module):
    """The best noise prediction for tokens from a standard normal, off by a relative error.

    For such tokens x_t is standard normal too, and E[noise | x_t] = sqrt(1 - alpha_bar) x_t. Like
    a network it predicts nothing larger than what it was trained on, however large x_t becomes.
    """

    def __init__(self, error: float):
        super().__init__()
        self.input_proj = torch.nn.Linear(1, 1)  # the sampler reads the dtype off it
        self.scale = 1 + error
        self.table = Diffusion().sqrt_one_minus_alpha_bars

    def forward(self, x, t, z):
        noise = self.scale * self.table[t].float()[:, None] * x.clamp(-5, 5)
        return torch.cat([noise, torch.zeros_like(noise)], dim=1)


def draw(error: float, clip: float | None, steps: int = 100) -> torch.Tensor:
    head = DiffLoss(4, 4, depth=1, width=4)
    head.net = AlmostRight(error)
    g = torch.Generator().manual_seed(0)
    return head.sample(torch.zeros(500, 4), clip=clip, num_sampling_steps=steps, generator=g)


@pytest.mark.parametrize("steps", [25, 100, 1000])
def test_an_exact_prediction_needs_no_bound(steps):
    assert draw(0.0, None, steps).std() == pytest.approx(1.0, abs=0.06)


@pytest.mark.parametrize("error", [0.05, -0.05])
def test_a_small_error_ruins_the_sample_without_a_bound_on_x0(error):
    assert draw(error, None).std() > 10
    assert draw(error, 4.0).std() == pytest.approx(1.0, abs=0.1)


def test_the_bound_holds_and_changes_nothing_within():
    d, g = Diffusion(10), torch.Generator().manual_seed(0)
    output, x = torch.randn(6, 8, generator=g), torch.randn(6, 4, generator=g)
    free, bounded = (d.p_mean_variance(output, x, 9, clip=clip) for clip in (None, 1.5))
    assert free.x0.abs().max() > 100 and bounded.x0.abs().max() <= 1.5
    early = d.p_mean_variance(0.01 * output, 0.1 * x, 1, clip=50.0)
    assert torch.equal(early.mean, d.p_mean_variance(0.01 * output, 0.1 * x, 1).mean)


@pytest.mark.parametrize("steps", [2, 3, 25, 999, 1000])
def test_respacing_keeps_both_ends_and_the_noise_levels(steps):
    full, d = Diffusion(), Diffusion(steps)
    assert int(d.timestep_map[0]) == 0 and int(d.timestep_map[-1]) == 999
    assert len(d.timestep_map.unique()) == steps
    assert torch.equal(d.alpha_bars, full.alpha_bars[d.timestep_map])
    assert torch.allclose((1 - d.betas).cumprod(0), d.alpha_bars, rtol=1e-9)


@pytest.mark.parametrize("steps", [-1, 0, 1, 1001])
def test_number_of_steps_out_of_range(steps):
    with pytest.raises(ValueError, match=f"num_sampling_steps is {steps}; expected 2 to 1000"):
        Diffusion(steps)


def test_posterior_agrees_with_bayes_on_a_grid():
    """q(x_{t-1} | x_t, x0) from the product of the two normals that define it."""
    d, t, x0, x_t = Diffusion(50), 20, 0.7, -0.4
    grid = torch.linspace(-6, 6, 200_001, dtype=torch.float64)
    beta, before = d.betas[t], d.alpha_bars[t - 1]
    log_p = -((grid - before.sqrt() * x0) ** 2) / (2 * (1 - before))
    log_p = log_p - (x_t - (1 - beta).sqrt() * grid) ** 2 / (2 * beta)
    p = torch.softmax(log_p, 0)
    mean = float((p * grid).sum())
    variance = float((p * (grid - mean) ** 2).sum())
    got = d.posterior_mean(torch.tensor([[x0]]).double(), torch.tensor([[x_t]]).double(), t)
    assert float(got) == pytest.approx(mean, rel=1e-6)
    assert float(d.posterior_variance[t]) == pytest.approx(variance, rel=1e-6)
    assert float(d.posterior_log_variance[t]) == pytest.approx(math.log(variance), rel=1e-6)


def test_noising_step_by_step_is_noising_in_one_go():
    d, g = Diffusion(), torch.Generator().manual_seed(0)
    x0 = torch.full((20_000, 1), 2.0)
    x = x0
    for t in range(300):
        beta = float(d.betas[t])
        x = math.sqrt(1 - beta) * x + math.sqrt(beta) * torch.randn(x.shape, generator=g)
    noise = torch.randn(x.shape, generator=g)
    jump = d.q_sample(x0, torch.full((20_000,), 299), noise)
    assert float(x.mean()) == pytest.approx(float(jump.mean()), abs=0.02)
    assert float(x.std()) == pytest.approx(float(jump.std()), abs=0.02)


def test_kl_agrees_with_the_library():
    mean1, mean2, logvar1, logvar2 = torch.randn(4, 30, generator=torch.Generator().manual_seed(1))
    want = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean1, (0.5 * logvar1).exp()),
        torch.distributions.Normal(mean2, (0.5 * logvar2).exp()),
    )
    assert torch.allclose(normal_kl(mean1, logvar1, mean2, logvar2), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.05), (0.4, 0.3), (-0.95, 0.1)])
def test_bins_of_the_discretised_likelihood_sum_to_one(mean, std):
    bins = torch.linspace(-1, 1, 256)
    nll = discretised_nll(bins, torch.full_like(bins, mean), torch.full_like(bins, math.log(std)))
    assert float((-nll).exp().sum()) == pytest.approx(1.0, abs=2e-3)


def test_temperature_scales_the_injected_noise_alone():
    d, g = Diffusion(10), torch.Generator().manual_seed(0)
    output, x, noise = (torch.randn(6, c, generator=g) for c in (8, 4, 4))
    mean = d.p_mean_variance(output, x, 5).mean
    full, half = (d.p_sample(output, x, 5, noise, temperature) for temperature in (1.0, 0.5))
    assert torch.allclose(half - mean, 0.5 * (full - mean), atol=1e-6)
    assert torch.equal(d.p_sample(output, x, 0, noise), d.p_mean_variance(output, x, 0).mean)


def test_the_variational_term_teaches_the_variance_alone():
    d, g = Diffusion(), torch.Generator().manual_seed(0)
    output = torch.randn(6, 8, generator=g, requires_grad=True)
    x0, noise = (torch.randn(6, 4, generator=g) for _ in range(2))
    t = torch.tensor([0, 1, 10, 100, 500, 999])
    terms = d.loss(output, x0, d.q_sample(x0, t, noise), t, noise)
    (grad,) = torch.autograd.grad(terms["vb"].sum(), output, retain_graph=True)
    assert not grad[:, :4].any() and grad[:, 4:].any()
    (grad,) = torch.autograd.grad(terms["mse"].sum(), output)
    assert grad[:, :4].any() and not grad[:, 4:].any()
