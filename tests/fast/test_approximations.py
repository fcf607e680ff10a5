"""Faster, approximate sampling: each way equals the exact sampler in its limit."""

import math

import pytest
import torch
from golden_values import fill, relative_error

from mar_mini import MAR, generate, sample
from mar_mini.diffloss import reverse_walk
from mar_mini.diffusion import SOLVERS, Diffusion
from mar_mini.fast import FAST, Reuse, dpm_solver
from mar_mini.masking import masked_after
from mar_mini.sampling import anneal, exact_conditions
from mar_mini.transformer import Block

WALKS = {**SOLVERS, "dpm_solver": dpm_solver}
SIZES = {
    "img_size": 16,
    "vae_stride": 1,
    "patch_size": 4,
    "vae_embed_dim": 1,
    "class_num": 10,
    "encoder_embed_dim": 32,
    "encoder_depth": 2,
    "encoder_num_heads": 2,
    "decoder_embed_dim": 32,
    "decoder_depth": 2,
    "decoder_num_heads": 2,
    "buffer_size": 2,
    "diffloss_d": 1,
    "diffloss_w": 32,
    "num_sampling_steps": 6,
    "attn_dropout": 0.0,
    "proj_dropout": 0.0,
}
LABELS = torch.tensor([3, 7])


@pytest.fixture(scope="module")
def model() -> MAR:
    return fill(MAR(**SIZES), 7)


def draw(model: MAR, labels=LABELS, seed: int = 0, **settings) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    settings = {"num_iter": 6, "cfg": 3.0, "clip": 3.0, **settings}
    return generate(model, labels, generator=generator, **settings)


# Solvers: tokens from a normal distribution, for which everything is known ------------------------

MEAN, STD = 0.7, 0.5


def exact_network(diffusion: Diffusion):
    """E[noise | x_t] for tokens from N(MEAN, STD^2)."""

    def denoise(x, i):
        signal, noise = diffusion.sqrt_alpha_bars[i], diffusion.sqrt_one_minus_alpha_bars[i]
        predicted = noise * (x - signal * MEAN) / (signal**2 * STD**2 + noise**2)
        return torch.cat([predicted, torch.zeros_like(x)], dim=1).double()

    return denoise


def solve(name: str, num_steps: int, start: torch.Tensor) -> torch.Tensor:
    solver, diffusion = reverse_walk(WALKS[name], num_steps)
    return solver(exact_network(diffusion), diffusion, lambda: start, 1.0, None)


def end_of_path(diffusion: Diffusion, x: torch.Tensor) -> torch.Tensor:
    """Where the deterministic path leads: the same quantile of the tokens' distribution."""
    signal, noise = diffusion.sqrt_alpha_bars[-1], diffusion.sqrt_one_minus_alpha_bars[-1]
    return MEAN + STD * (x - signal * MEAN) / (signal**2 * STD**2 + noise**2).sqrt()


@pytest.mark.parametrize("name", ["ddim", "dpm_solver"])
def test_deterministic_paths_end_where_they_should(name):
    start = torch.linspace(-3, 3, 50, dtype=torch.float64)[:, None]
    want = end_of_path(Diffusion(100, 980), start)
    errors = {n: float((solve(name, n, start) - want).abs().max()) for n in (10, 20, 40, 160, 640)}
    assert errors[10] > errors[40] > errors[160] > errors[640]
    assert errors[640] < 0.01


def test_curved_steps_need_fewer():
    start = torch.linspace(-3, 3, 50, dtype=torch.float64)[:, None]
    want = end_of_path(Diffusion(100, 980), start)
    straight, curved = (
        float((solve(name, 20, start) - want).abs().max()) for name in ("ddim", "dpm_solver")
    )
    assert curved < straight / 2


@pytest.mark.parametrize("name", list(WALKS))
def test_solvers_draw_from_the_distribution(name):
    solver, diffusion = reverse_walk(WALKS[name], 100)
    generator = torch.Generator().manual_seed(0)
    n = 20_000

    def noise():
        return torch.randn(n, 1, generator=generator, dtype=torch.float64)

    x = solver(exact_network(diffusion), diffusion, noise, 1.0, None)
    assert abs(float(x.mean()) - MEAN) < 5 * STD / math.sqrt(n) + 0.01
    assert float(x.std()) == pytest.approx(STD, rel=0.05)


@pytest.mark.parametrize("name", ["ddim", "dpm_solver"])
def test_deterministic_solvers_draw_once(name):
    diffusion, calls = Diffusion(10, 980), []

    def noise():
        calls.append(1)
        return torch.ones(3, 1, dtype=torch.float64)

    cold = WALKS[name](exact_network(diffusion), diffusion, noise, 0.0, None)
    assert len(calls) == 1
    torch.testing.assert_close(cold, end_of_path(diffusion, 0 * cold), rtol=0, atol=0.1)


def test_the_bound_on_x0_holds_in_every_solver():
    for walk in WALKS.values():
        solver, diffusion = reverse_walk(walk, 8)
        x = solver(exact_network(diffusion), diffusion, lambda: torch.ones(3, 1).double(), 1.0, 0.2)
        assert x.abs().max() <= 0.2 + 1e-9


def test_an_unknown_solver_is_refused(model):
    with pytest.raises(ValueError, match="unknown solver 'euler'; expected one of: ddpm, ddim"):
        sample(model, LABELS, num_iter=4, solver="euler")
    with pytest.raises(ValueError, match="num_sampling_steps is 990; expected 2 to 981"):
        sample(model, LABELS, num_iter=4, solver="ddim", num_sampling_steps=990)


# Fewer diffusion steps for later tokens -----------------------------------------------------------


def test_annealing_between_equal_numbers_changes_nothing(model):
    assert torch.equal(draw(model, num_sampling_steps=(9, 9)), draw(model, num_sampling_steps=9))


def test_annealing_falls_with_the_share_that_is_known():
    assert anneal((50, 5), [0.0, 0.25, 0.5, 1.0]) == [50, 39, 28, 5]
    assert anneal((50, 5), [0.3]) == [50]
    assert anneal(None, [0.0, 0.5]) == [None, None]


def test_annealing_refuses_what_is_no_number_of_steps(model):
    with pytest.raises(ValueError, match="num_sampling_steps is 1; expected 2 to 1000"):
        sample(model, LABELS, num_iter=4, num_sampling_steps=(50, 1))


# Guidance in an interval --------------------------------------------------------------------------


def test_guidance_everywhere_is_guidance(model):
    assert torch.equal(draw(model, guidance_interval=(0.0, 1.0)), draw(model))


def test_guidance_in_no_step_is_none(model):
    # of 16 tokens the last step begins with at most 15 known
    got = draw(model, guidance_interval=(0.99, 1.0))
    assert torch.equal(got, draw(model, cfg=1.0))


def test_guidance_acts_inside_the_interval_only(monkeypatch, model):
    asked = []
    original = type(model.diffloss).sample
    monkeypatch.setattr(
        type(model.diffloss),
        "sample",
        lambda self, z, z_uncond=None, **given: (
            asked.append(z_uncond is not None),
            original(self, z, z_uncond, **given),
        )[1],
    )
    draw(model, guidance_interval=(0.2, 0.6))
    shares = [1 - n / 16 for n in (16, *masked_after(16, 6)[:-1])]
    assert asked == [0.2 <= share < 0.6 for share in shares] and any(asked) and not all(asked)


@pytest.mark.parametrize("interval", [(0.5, 0.5), (-0.1, 1.0), (0.0, 1.1), (0.7, 0.2)])
def test_an_impossible_interval_is_refused(model, interval):
    with pytest.raises(ValueError, match="guidance_interval is .* 0 <= first < second <= 1"):
        sample(model, LABELS, num_iter=4, guidance_interval=interval)


# Features and guidance out of memory --------------------------------------------------------------


def conditions_of(model: MAR, refresh_features: int, refresh_guidance: int):
    """z and z_uncond of each iteration with reuse, and exactly, for the same tokens."""
    reuse = Reuse(refresh_features, refresh_guidance)(model, LABELS)
    tokens = torch.randn(2, 16, 16)
    order = torch.rand(2, 16).argsort(1)
    left, pairs = 16, []
    for after in masked_after(16, 6):
        mask, still = (
            torch.zeros(2, 16, dtype=torch.bool).scatter(1, order[:, 16 - n :], True)
            for n in (left, after)
        )
        given = (tokens.masked_fill(mask[..., None], 0), mask, mask & ~still, True)
        with torch.no_grad():
            pairs.append((reuse(*given), exact_conditions(model, LABELS, *given)))
        left = after
    return pairs


def test_reuse_of_nothing_is_exact(model):
    for got, want in conditions_of(model, 1, 1):
        for a, b in zip(got, want, strict=True):
            assert relative_error(a, b) < 1e-6


def test_the_difference_is_exact_where_it_is_computed(model):
    for step, (got, want) in enumerate(conditions_of(model, 1, 3)):
        assert relative_error(got[0], want[0]) < 1e-6
        error = relative_error(got[1], want[1])
        assert error < 1e-6 if step % 3 == 0 else 1e-6 < error < 1


@pytest.mark.parametrize("every", [2, 3])
def test_features_are_exact_where_all_are_computed(model, every):
    for step, (got, want) in enumerate(conditions_of(model, every, 1)):
        for a, b in zip(got, want, strict=True):
            error = relative_error(a, b)
            assert error < 1e-6 if step % every == 0 else 1e-6 < error < 1


def test_one_iteration_leaves_nothing_to_reuse(model):
    want = draw(model, num_iter=1)
    got = draw(model, num_iter=1, conditions=Reuse(5, 5))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-3)


def test_known_tokens_stay_with_everything_on(model):
    tokens = torch.randn(2, 16, 16)
    known = torch.arange(16).expand(2, -1) % 3 == 0
    got = draw(model, tokens=tokens, known=known, **FAST)
    assert torch.equal(got[known], tokens[known]) and torch.isfinite(got).all()


class Other(Block):
    def forward(self, x):
        return super().forward(x)


def test_reuse_refuses_blocks_that_it_does_not_know():
    with pytest.raises(ValueError, match="reusing features needs the blocks of mar_mini"):
        sample(fill(MAR(**SIZES, block=Other), 7), LABELS, num_iter=4, conditions=Reuse(2))


@pytest.mark.parametrize("name", ["refresh_features", "refresh_guidance"])
def test_how_often_is_a_positive_integer(name):
    with pytest.raises(ValueError, match=f"{name} is 0; expected 1"):
        Reuse(**{name: 0})
