"""Checks of chapter 3: noise schedule, forward noising, the reverse step read and drawn."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mar_mini import diffusion
from mar_mini.checks import Failed, close, exercise, refuse_mistakes, same_dtype, same_shape
from mar_mini.diffusion import Diffusion, ReverseStep


@contextmanager
def _ideas(ideas: dict[str, str]) -> Iterator[None]:
    """Put the idea of a mistake before what Python or torch says of it; the line stays known.

    ideas  sentences, by words that the error's text contains; the first that fits counts
    """
    try:
        yield
    except (RuntimeError, TypeError, AttributeError, ValueError) as error:
        found = [idea for words, idea in ideas.items() if words in str(error)]
        if found:
            error.args = (f"{found[0]}; Python says: {error}",)
        raise


def _repeatable(again: Callable[[], Tensor], got: Tensor, what: str, instead: str) -> None:
    """Expect the same result from a second call: randomness comes in as an argument only."""
    if not torch.allclose(again(), got, equal_nan=True):
        raise Failed(f"{what} differs from call to call: it draws noise of its own; {instead}")


@exercise(reference=diffusion.cosine_alpha_bars)
def cosine_alpha_bars(candidate):
    for steps in (10, 1000):
        what, got = f"cosine_alpha_bars({steps})", candidate(steps)
        want = diffusion.cosine_alpha_bars(steps)
        if isinstance(got, Tensor) and got.shape == (steps - 1,):
            raise Failed(f"{what} lacks a step: u needs {steps + 1} values for {steps} ratios")
        same_shape(got, want.shape, what)
        u = torch.arange(steps + 1, dtype=torch.float64) / steps
        s = torch.cos((u + 0.008) / 1.008 * torch.pi / 2) ** 2
        stretched = torch.linspace(0, 1, steps + 1, dtype=torch.float64)[1:]
        betas = 1 - want / torch.cat([want.new_ones(1), want[:-1]])
        mistakes = {
            "holds betas, what one step takes away; multiply the 1 - beta up": betas,
            "holds 1 - beta of each single step; multiply them up": 1 - betas,
            "multiplies the betas up; multiply up what is left, 1 - beta": betas.cumprod(0),
            "adds the 1 - beta up; multiply them up": (1 - betas).cumsum(0),
            "is s(t / T) itself; make betas of the ratios, and multiply up 1 - beta": s[:-1],
            "is s((t + 1) / T) itself; it is the ratio to s before the step that counts": s[1:],
            "is upside down: that is the share of noise": 1 - want,
            "lets the last step remove everything: no beta is larger than 0.999": _kept(u, limit=1),
            "bounds beta by 0.99; the bound is 0.999": _kept(u, limit=0.99),
            "lacks the 0.008 that keeps the first steps from being too small": _kept(u, offset=0),
            "lacks the square: alpha_bar is a share of variance, its root scales the signal": (
                _kept(u, power=1)
            ),
            "is the root of alpha_bar; alpha_bar is a share of variance": want.sqrt(),
            "is one step late: alpha_bar(0) is what is left after the first step": (
                torch.cat([want.new_ones(1), want[:-1]])
            ),
            "spreads t over 0 to 1 with both ends; after step t the share is signal((t + 1) / T)": (
                _kept(torch.cat([u[:1], (stretched * steps - 1) / (steps - 1)]))
            ),
            "uses betas on a straight line (Ho et al.), expected the cosine": (
                1 - torch.linspace(1e-4, 0.02, steps, dtype=torch.float64)
            ).cumprod(0),
        }
        refuse_mistakes(got, want, mistakes, what)
        same_dtype(got, torch.float64, what)
        close(got, want, what, rtol=1e-6, atol=0.0)


def _kept(u, *, offset=0.008, power=2, limit=0.999):
    """alpha_bar with other constants, from the times u before and after the steps."""
    signal = torch.cos((u + offset) / (1 + offset) * torch.pi / 2) ** power
    return (1 - (1 - signal[1:] / signal[:-1]).clamp(max=limit)).cumprod(0)


@exercise(reference=Diffusion.q_sample)
def q_sample(candidate):
    d, g = Diffusion(50), torch.Generator().manual_seed(3)
    x0, noise = (0.5 + torch.rand(6, 2, generator=g) for _ in range(2))
    t = torch.tensor([12, 0, 30, 5, 44, 49])
    given = x0.clone(), noise.clone()
    want, what = d.q_sample(x0, t, noise), "x_t"
    column = "has one level for each row, but not as a column (6, 1); `diffusion.at` makes one"
    with _ideas({"must match": column}):
        got = candidate(d, x0, t, noise)
    same_shape(got, want.shape, what)
    if not (torch.equal(x0, given[0]) and torch.equal(noise, given[1])):
        raise Failed("q_sample changed what it was given; make a new tensor")
    _repeatable(lambda: candidate(d, x0, t, noise), got, what, "use the `noise` that is given")
    a = d.alpha_bars[t].float()[:, None]
    beta = d.betas[t].float()[:, None]
    signal, spread = d.at(d.sqrt_alpha_bars, t), d.at(d.sqrt_one_minus_alpha_bars, t)
    mistakes = {
        "lacks the roots: alpha_bar is a share of variance, what scales x0 is its root": (
            a * x0 + (1 - a) * noise
        ),
        "takes the root for the signal, but 1 - alpha_bar without root for the noise": (
            signal * x0 + (1 - a) * noise
        ),
        "scales the noise by 1 - root; it is the variances that sum to 1": (
            signal * x0 + (1 - signal) * noise
        ),
        "scales the noise like x0, but its variance is 1 - alpha_bar": signal * (x0 + noise),
        "has signal and noise the wrong way round": spread * x0 + signal * noise,
        "adds noise without shrinking the signal": x0 + spread * noise,
        "takes the noise away; add it": signal * x0 - spread * noise,
        "takes one step only: that is beta's noise, alpha_bar has that of all steps up to t": (
            (1 - beta).sqrt() * x0 + beta.sqrt() * noise
        ),
        "noises all rows to the first row's level": d.q_sample(x0, t[:1].expand(6), noise),
        "uses the 1000 levels of training; t counts the levels of this diffusion": (
            Diffusion().q_sample(x0, t, noise)
        ),
        "is one level late: alpha_bars[t] is the level, not t - 1": (
            d.q_sample(x0, (t - 1).clamp(min=0), noise)
        ),
        "is one level early: alpha_bars[t] is the level, not t + 1": (
            d.q_sample(x0, (t + 1).clamp(max=49), noise)
        ),
    }
    refuse_mistakes(got, want, mistakes, what)
    same_dtype(got, x0.dtype, what)
    close(got, want, what)


def _trial(steps: int = 50):
    """A diffusion, an output (5, 4) and x_t (5, 2) for the reverse step, in float64."""
    g = torch.Generator().manual_seed(4)
    output, x_t, noise = (torch.randn(5, c, generator=g).double() for c in (4, 2, 2))
    return Diffusion(steps), output, x_t, noise


@exercise(reference=Diffusion.p_mean_variance)
def p_mean_variance(candidate):
    d, output, x_t, _ = _trial()
    noise, v = output.chunk(2, dim=1)
    swapped = torch.cat([v, noise], 1)
    every_other = torch.cat([output[:, ::2], output[:, 1::2]], 1)
    columns = "does not halve the columns of the output, (N, 2C): `output.chunk(2, dim=1)`"
    number = "for one t `diffusion.at` gives a float, no tensor: use `**0.5` and `math.exp`"
    ideas = {
        "NoneType": "clip may be None: then x0 has no bound",
        "must match": columns,
        "unpack": columns,
        "float": number,
    }
    for t, clip in ((5, None), (30, None), (30, 0.8), (49, 1.5), (1, None), (0, 0.3)):
        call = f"p_mean_variance(d, output, x_t, {t}, clip={clip})"
        read = functools.partial(d.p_mean_variance, x_t=x_t, t=t, clip=clip)
        want, flipped = read(output), read(swapped)
        with _ideas(ideas):
            got = candidate(d, output, x_t, t, clip)
        if not isinstance(got, ReverseStep):
            raise Failed(f"{call} is a {type(got).__name__}, expected a ReverseStep")
        free = d.p_mean_variance(output, x_t, t).x0
        level, spread = float(d.sqrt_alpha_bars[t]), float(d.sqrt_one_minus_alpha_bars[t])
        bound = (lambda x, c=clip: x) if clip is None else (lambda x, c=clip: x.clamp(-c, c))
        x0_mistakes = {
            "is the output; that is the noise, of which x0 follows": bound(noise),
            "takes every other column for noise; the first half is noise": read(every_other).x0,
            "uses the 1000 levels of training; t counts the levels of this diffusion": (
                Diffusion().p_mean_variance(output, x_t, t, clip).x0
            ),
            "is not bounded: it leaves [-clip, clip]": free,
            "is not divided by the root of alpha_bar": bound(x_t - spread * noise),
            "takes v for the noise: the first half of the output is the noise": flipped.x0,
            "adds the noise; take it away": bound((x_t + spread * noise) / level),
            "lacks the roots: it is the root of alpha_bar that scales the signal": (
                bound((x_t - spread**2 * noise) / level**2)
            ),
            "is bounded above only": free if clip is None else free.clamp(max=clip),
            "is bounded too early: bound x0 itself, not the noise": (
                free if clip is None else (x_t - spread * noise.clamp(-clip, clip)) / level
            ),
        }
        refuse_mistakes(got.x0, want.x0, x0_mistakes, f"{call}: x0")
        close(got.x0, want.x0, f"{call}: x0")
        before = float(d.alpha_bars[t - 1]) if t else 1.0
        x0, coef_x0, coef_xt = want.x0, float(d.coef_x0[t]), float(d.coef_xt[t])
        mean_mistakes = {
            "uses x0 before it was bounded": d.posterior_mean(free, x_t, t),
            "is x0: one step goes only part of the way there": x0,
            "has the coefficients of x0 and x_t the wrong way round": coef_xt * x0 + coef_x0 * x_t,
            "noises x0 to the level before with the same noise, as DDIM does; DDPM mixes x0 and "
            "x_t": before**0.5 * x0 + (1 - before) ** 0.5 * noise,
            "uses the coefficients of the level before": d.posterior_mean(x0, x_t, max(t - 1, 0)),
        }
        refuse_mistakes(got.mean, want.mean, mean_mistakes, f"{call}: mean")
        close(got.mean, want.mean, f"{call}: mean")
        high, low = float(d.log_betas[t]), float(d.posterior_log_variance[t])
        part, right = (v + 1) / 2, want.log_variance
        variance_mistakes = {
            "is v; that only says where between the two limits it lies": v,
            "uses v itself as the share; v runs from -1 to 1, so its share is (v + 1) / 2": (
                v * high + (1 - v) * low
            ),
            "has the ends the wrong way round: v = 1 stands for log beta": (
                part * low + (1 - part) * high
            ),
            "mixes the variances; mix their logarithms": (
                torch.log(part * torch.tensor(high).exp() + (1 - part) * torch.tensor(low).exp())
            ),
            "is the variance, expected its logarithm": right.exp(),
            "is the logarithm of the standard deviation, half of what is expected": right / 2,
            "is log beta, whatever v says": torch.full_like(v, high),
            "is the posterior's, whatever v says": torch.full_like(v, low),
            "takes the noise for v: the second half of the output is v": flipped.log_variance,
        }
        refuse_mistakes(got.log_variance, right, variance_mistakes, f"{call}: log_variance")
        close(got.log_variance, right, f"{call}: log_variance")


@exercise(reference=Diffusion.p_sample)
def p_sample(candidate):
    d, output, x_t, noise = _trial()
    cases = ((20, 1.0, None), (20, 0.9, None), (40, 0.9, 0.5), (0, 1.0, None), (0, 0.8, 0.5))
    for t, temperature, clip in cases:
        call = f"p_sample(d, output, x_t, {t}, noise, {temperature}, clip={clip})"
        again = functools.partial(candidate, d, output, x_t, t, noise, temperature, clip)
        got = again()
        want = d.p_sample(output, x_t, t, noise, temperature, clip)
        same_shape(got, want.shape, call)
        if got.isnan().any():
            raise Failed(f"{call} is nan: log_variance is negative; take exp before the root")
        _repeatable(again, got, call, "use the `noise` that is given")
        step = d.p_mean_variance(output, x_t, t, clip)
        std = torch.exp(0.5 * step.log_variance)
        moved = temperature * std * noise
        mistakes = {
            "adds noise at t = 0, where the token must come out clean": step.mean + moved,
            "is the mean, without any noise": step.mean,
            "is the predicted x0; one step goes to the mean, and adds noise": step.x0,
            "leaves the temperature out": d.p_sample(output, x_t, t, noise, 1.0, clip),
            "scales the variance by the temperature; scale the noise, the standard deviation": (
                step.mean + temperature**0.5 * std * noise
            ),
            "scales the standard deviation by the temperature squared; once is enough": (
                step.mean + temperature**2 * std * noise
            ),
            "scales the mean by the temperature too; it scales the injected noise alone": (
                temperature * (step.mean + std * noise if t else step.mean)
            ),
            "leaves the bound on x0 out": d.p_sample(output, x_t, t, noise, temperature, None),
            "scales the noise by the variance; its root is the standard deviation": (
                step.mean + temperature * std**2 * noise
            ),
            "scales the noise by the logarithm of the variance; take exp, then the root": (
                step.mean + temperature * step.log_variance * noise
            ),
            "adds the noise to x_t; it is the mean that it is added to": x_t + moved,
        }
        refuse_mistakes(got, want, mistakes, call)
        close(got, want, call)
    again = functools.partial(candidate, d, output, x_t, 20, None)
    call = "p_sample(d, output, x_t, 20, noise=None)"
    nothing = "None: inject nothing, return the mean"
    with _ideas({"NoneType": nothing}):
        got = again()
    want = d.p_sample(output, x_t, 20, None)
    same_shape(got, want.shape, call)
    _repeatable(again, got, call, nothing)
    close(got, want, call)
