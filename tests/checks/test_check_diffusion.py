"""The checks of chapter 3 refuse plausible mistakes, each by the name of its idea."""

import math

import pytest
import torch

from mar_mini.checks import Failed
from mar_mini.checks import diffusion as check
from mar_mini.diffusion import Diffusion, ReverseStep


@pytest.fixture(autouse=True)
def strict(monkeypatch):
    monkeypatch.setenv("MAR_MINI_STRICT", "1")


def schedule(num_timesteps=1000, offset=0.008, limit=0.999, power=2, times=None):
    if times is None:
        times = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    signal = torch.cos((times + offset) / (1 + offset) * math.pi / 2) ** power
    return (1 - (1 - signal[1:] / signal[:-1]).clamp(max=limit)).cumprod(0)


def closed_form(num_timesteps=1000):
    u = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    signal = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return signal[1:] / signal[0]


def single_steps(num_timesteps=1000):
    kept = schedule(num_timesteps)
    return kept / torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])


def signal_itself(after):
    def cosine_alpha_bars(num_timesteps=1000):
        u = torch.arange(num_timesteps, dtype=torch.float64) + after
        return torch.cos((u / num_timesteps + 0.008) / 1.008 * math.pi / 2) ** 2

    return cosine_alpha_bars


def straight_line(num_timesteps=1000):
    return (1 - torch.linspace(1e-4, 0.02, num_timesteps, dtype=torch.float64)).cumprod(0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda n=1000: schedule(n, offset=0), "lacks the 0.008"),  # off by less than 10%
        (lambda n=1000: schedule(n, limit=0.99), "bounds beta by 0.99"),
        (closed_form, "last step remove everything"),
        (lambda n=1000: schedule(n, power=1), "lacks the square"),
        (single_steps, "1 - beta of each single step"),
        (lambda n=1000: 1 - single_steps(n), "holds betas"),
        (lambda n=1000: (1 - single_steps(n)).cumprod(0), "multiplies the betas up"),
        (lambda n=1000: single_steps(n).cumsum(0), "adds the 1 - beta up"),
        (signal_itself(0), r"is s\(t / T\) itself"),
        (signal_itself(1), r"is s\(\(t \+ 1\) / T\) itself"),
        (lambda n=1000: schedule(n)[:-1], "u needs 11 values"),
        (lambda n=1000: 1 - schedule(n), "upside down"),
        (lambda n=1000: schedule(n).sqrt(), "is the root"),
        (straight_line, "straight line"),
        (lambda n=1000: torch.cat([torch.ones(1).double(), schedule(n)[:-1]]), "one step late"),
        (lambda n=1000: schedule(n).float(), "dtype torch.float32, expected torch.float64"),
        (lambda n=1000: torch.cat([torch.ones(1).double(), schedule(n)]), r"shape \(11,\)"),
        (lambda n=1000: schedule(n) * 1.001, r"\[0\] is"),
    ],
)
def test_cosine_alpha_bars(wrong, message):
    with pytest.raises(Failed, match=message):
        check.cosine_alpha_bars(wrong)


def mix(signal, spread):
    """A forward noising with these scales of signal and noise, made of alpha_bar (N, 1)."""

    def q_sample(diffusion, x0, t, noise):
        a = diffusion.alpha_bars[t].float()[:, None]
        return signal(a) * x0 + spread(a) * noise

    return q_sample


def no_column(diffusion, x0, t, noise):
    a = diffusion.alpha_bars[t].float()
    return a.sqrt() * x0 + (1 - a).sqrt() * noise


def one_step(diffusion, x0, t, noise):
    beta = diffusion.at(diffusion.betas, t)
    return (1 - beta).sqrt() * x0 + beta.sqrt() * noise


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda d, x, t, e: d.q_sample(x, (t - 1).clamp(min=0), e), "one level late"),  # < 10% off
        (lambda d, x, t, e: d.q_sample(x, (t + 1).clamp(max=49), e), "one level early"),
        (mix(lambda a: a, lambda a: 1 - a), "lacks the roots"),
        (mix(lambda a: a**0.5, lambda a: 1 - a), "but 1 - alpha_bar without root"),
        (mix(lambda a: a**0.5, lambda a: 1 - a**0.5), "variances that sum to 1"),
        (mix(lambda a: (1 - a) ** 0.5, lambda a: a**0.5), "wrong way round"),
        (mix(lambda a: 1.0, lambda a: (1 - a) ** 0.5), "without shrinking"),
        (mix(lambda a: a**0.5, lambda a: -((1 - a) ** 0.5)), "takes the noise away"),
        (mix(lambda a: a**0.5, lambda a: a**0.5), "scales the noise like x0"),
        (lambda d, x, t, e: d.q_sample(x, t, torch.randn_like(x)), "draws noise of its own"),
        (no_column, r"not as a column \(6, 1\).*line 3 of no_column"),
        (one_step, "one step only"),
        (lambda d, x, t, e: d.q_sample(x, t[:1].expand(len(t)), e), "first row's level"),
        (lambda d, x, t, e: Diffusion().q_sample(x, t, e), "1000 levels of training"),
        (lambda d, x, t, e: d.q_sample(x, t, e).double(), "dtype torch.float64"),
        (lambda d, x, t, e: d.q_sample(x.mul_(2), t, e), "changed what it was given"),
    ],
)
def test_q_sample(wrong, message):
    with pytest.raises(Failed, match=message):
        check.q_sample(wrong)


def reverse(change):
    """The right reverse step with one thing changed."""

    def p_mean_variance(d, output, x_t, t, clip=None):
        step = d.p_mean_variance(output, x_t, t, clip)
        parts = {"mean": step.mean, "log_variance": step.log_variance, "x0": step.x0}
        return ReverseStep(**{**parts, **change(d, output, x_t, t, clip, step)})

    return p_mean_variance


def with_x0(formula):
    def change(d, output, x_t, t, clip, step):
        level, spread = float(d.sqrt_alpha_bars[t]), float(d.sqrt_one_minus_alpha_bars[t])
        x0 = formula(x_t, output.chunk(2, dim=1)[0], level, spread)
        x0 = x0 if clip is None else x0.clamp(-clip, clip)
        return {"x0": x0, "mean": d.posterior_mean(x0, x_t, t)}

    return reverse(change)


def with_variance(formula):
    def change(d, output, x_t, t, clip, step):
        v = output.chunk(2, dim=1)[1]
        return {"log_variance": formula(v, d.log_betas[t], d.posterior_log_variance[t])}

    return reverse(change)


def halves_swapped(d, output, x_t, t, clip=None):
    return d.p_mean_variance(output.roll(2, 1), x_t, t, clip)


def interleaved(d, output, x_t, t, clip=None):
    return d.p_mean_variance(torch.cat([output[:, ::2], output[:, 1::2]], 1), x_t, t, clip)


def halves_of_rows(d, output, x_t, t, clip=None):
    noise, _ = output.chunk(2, dim=0)
    return x_t - noise


def looked_up_first(d, output, x_t, t, clip=None):
    return x_t * d.at(d.log_betas, t).exp()


def bound_needed(d, output, x_t, t, clip=None):
    return d.p_mean_variance(output, x_t, t).x0.clamp(-clip, clip)


def linear_mix(v, high, low):
    return torch.log((v + 1) / 2 * high.exp() + (1 - v) / 2 * low.exp())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (with_x0(lambda x, e, a, s: x - s * e), "not divided by the root"),
        (with_x0(lambda x, e, a, s: (x + s * e) / a), "adds the noise"),
        (with_x0(lambda x, e, a, s: (x - s**2 * e) / a**2), "lacks the roots"),
        (with_x0(lambda x, e, a, s: e), "is the output; that is the noise"),
        (halves_swapped, "takes v for the noise"),
        (interleaved, "every other column"),
        (halves_of_rows, r"chunk\(2, dim=1\).*line 3 of halves_of_rows"),
        (bound_needed, "clip may be None"),
        (looked_up_first, "for one t `diffusion.at` gives a float.*line 2 of looked_up_first"),
        (lambda d, o, x, t, clip=None: Diffusion().p_mean_variance(o, x, t, clip), "1000 levels"),
        (lambda d, o, x, t, clip=None: d.p_mean_variance(o, x, t), "not bounded"),
        (
            reverse(
                lambda d, o, x, t, c, s: {
                    "x0": d.p_mean_variance(o, x, t).x0.clamp(max=c or math.inf)
                }
            ),
            "bounded above only",
        ),
        (
            reverse(
                lambda d, o, x, t, c, s: {
                    "mean": d.posterior_mean(d.p_mean_variance(o, x, t).x0, x, t)
                }
            ),
            "before it was bounded",
        ),
        (reverse(lambda d, o, x, t, c, s: {"mean": s.x0}), "is x0: one step"),
        (
            reverse(lambda d, o, x, t, c, s: {"mean": d.coef_xt[t] * s.x0 + d.coef_x0[t] * x}),
            "coefficients of x0 and x_t the wrong way",
        ),
        (
            reverse(
                lambda d, o, x, t, c, s: {
                    "mean": d.sqrt_alpha_bars[t - 1] * s.x0
                    + d.sqrt_one_minus_alpha_bars[t - 1] * o[:, :2]
                }
            ),
            "as DDIM does",
        ),
        (
            reverse(lambda d, o, x, t, c, s: {"mean": d.posterior_mean(s.x0, x, t - 1)}),
            "level before",
        ),
        (with_variance(linear_mix), "mix their logarithms"),  # off by less than 10%
        (with_variance(lambda v, high, low: v * high + (1 - v) * low), "uses v itself"),
        (with_variance(lambda v, high, low: (v + 1) / 2 * low + (1 - v) / 2 * high), "the ends"),
        (with_variance(lambda v, high, low: v), "is v; that only says"),
        (with_variance(lambda v, high, low: high.expand_as(v)), "is log beta"),
        (with_variance(lambda v, high, low: low.expand_as(v)), "is the posterior's"),
        (reverse(lambda d, o, x, t, c, s: {"log_variance": s.log_variance / 2}), "half of what"),
        (reverse(lambda d, o, x, t, c, s: {"log_variance": s.log_variance.exp()}), "its logarithm"),
        (
            reverse(lambda d, o, x, t, c, s: {"log_variance": s.log_variance * 1.01}),
            "log_variance.* is .*, expected",
        ),
        (lambda d, o, x, t, clip=None: (x, x, x), "is a tuple, expected a ReverseStep"),
    ],
)
def test_p_mean_variance(wrong, message):
    with pytest.raises(Failed, match=message):
        check.p_mean_variance(wrong)


def drawn(formula, at_zero=True):
    """A draw from the reverse step by a formula of (mean, std, noise, temperature)."""

    def p_sample(d, output, x_t, t, noise, temperature=1.0, clip=None):
        step = d.p_mean_variance(output, x_t, t, clip)
        if noise is None or (at_zero and t == 0):
            return step.mean
        return formula(step.mean, torch.exp(0.5 * step.log_variance), noise, temperature)

    return p_sample


def no_clip(d, output, x_t, t, noise, temperature=1.0, clip=None):
    return d.p_sample(output, x_t, t, noise, temperature)


def from_x_t(d, output, x_t, t, noise, temperature=1.0, clip=None):
    std = torch.exp(0.5 * d.p_mean_variance(output, x_t, t, clip).log_variance)
    return x_t + temperature * std * noise


def root_of_logarithm(d, output, x_t, t, noise, temperature=1.0, clip=None):
    step = d.p_mean_variance(output, x_t, t, clip)
    return step.mean + step.log_variance.sqrt() * noise


def own_noise(d, output, x_t, t, noise, temperature=1.0, clip=None):
    return d.p_sample(output, x_t, t, torch.randn_like(x_t), temperature, clip)


def own_noise_for_none(d, output, x_t, t, noise, temperature=1.0, clip=None):
    noise = torch.randn_like(x_t) if noise is None else noise
    return d.p_sample(output, x_t, t, noise, temperature, clip)


def only_x0(d, output, x_t, t, noise, temperature=1.0, clip=None):
    return d.p_mean_variance(output, x_t, t, clip).x0


def noise_needed(d, output, x_t, t, noise, temperature=1.0, clip=None):
    return d.p_sample(output, x_t, t, 1 * noise, temperature, clip)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (drawn(lambda m, s, e, k: m + s * e), "leaves the temperature out"),  # off by 10% at most
        (drawn(lambda m, s, e, k: m + k**0.5 * s * e), "scales the variance by the temp"),
        (drawn(lambda m, s, e, k: m + k**2 * s * e), "temperature squared"),
        (drawn(lambda m, s, e, k: k * (m + s * e)), "scales the mean"),
        (drawn(lambda m, s, e, k: m + k * s**2 * e), "scales the noise by the variance"),
        (drawn(lambda m, s, e, k: m + k * 2 * s.log() * e), "logarithm of the variance"),
        (drawn(lambda m, s, e, k: m), "is the mean, without"),
        (drawn(lambda m, s, e, k: m + k * s * e, at_zero=False), "adds noise at t = 0"),
        (no_clip, "leaves the bound"),
        (from_x_t, "adds the noise to x_t"),
        (only_x0, "is the predicted x0"),
        (root_of_logarithm, "is nan: log_variance is negative"),
        (own_noise, "own; use the `noise` that is given"),
        (own_noise_for_none, "own; None: inject nothing, return the mean"),
        (noise_needed, "TypeError: None: inject nothing.*line 2 of noise_needed"),
    ],
)
def test_p_sample(wrong, message):
    with pytest.raises(Failed, match=message):
        check.p_sample(wrong)


def test_right_solutions_pass():
    def noised(diffusion, x0, t, noise):
        a = diffusion.alpha_bars[t][:, None]
        return (a.sqrt() * x0 + (1 - a).sqrt() * noise).float()

    def read(diffusion, output, x_t, t, clip=None):
        noise, v = output[:, :2], output[:, 2:]
        a, beta = diffusion.alpha_bars[t], diffusion.betas[t]
        before = a / (1 - beta)
        x0 = (x_t - (1 - a).sqrt() * noise) / a.sqrt()
        x0 = x0 if clip is None else x0.clip(-clip, clip)
        mean = (before.sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - before) * x_t) / (1 - a)
        low, high = diffusion.posterior_log_variance[t], beta.log()
        return ReverseStep(mean, low + (high - low) * (v + 1) / 2, x0)

    right = drawn(lambda mean, std, noise, temperature: mean + temperature * std * noise)
    assert check.cosine_alpha_bars(schedule) is schedule
    assert check.q_sample(noised) is noised
    assert check.p_mean_variance(read) is read
    assert check.p_sample(right) is right
    for name in ("cosine_alpha_bars", "q_sample", "p_mean_variance", "p_sample"):
        checkpoint = getattr(check, name)
        assert checkpoint(checkpoint.reference) is checkpoint.reference
