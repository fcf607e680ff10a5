"""The checks of chapter 2 refuse plausible mistakes, each by the name of its idea."""

import math

import pytest
import torch

from mar_mini.checks import Failed
from mar_mini.checks import vae as check
from mar_mini.vae import DiagonalGaussian, latent_scale


@pytest.fixture(autouse=True)
def strict(monkeypatch):
    monkeypatch.setenv("MAR_MINI_STRICT", "1")


def noise_like(posterior, generator):
    return torch.randn(posterior.mean.shape, generator=generator)


def with_std(std):
    """A draw whose standard deviation is a function of the log variance."""
    return lambda p, generator=None: p.mean + std(p.logvar) * noise_like(p, generator)


def seed_ignored(posterior, generator=None):
    return posterior.mean + torch.exp(0.5 * posterior.logvar) * torch.randn_like(posterior.mean)


def uniform(posterior, generator=None):
    noise = torch.rand(posterior.mean.shape, generator=generator)
    return posterior.mean + torch.exp(0.5 * posterior.logvar) * noise


def one_for_the_batch(posterior, generator=None):
    noise = torch.randn(posterior.mean.shape[1:], generator=generator)
    return posterior.mean + torch.exp(0.5 * posterior.logvar) * noise


def standardised(posterior, generator=None):  # off by less than 10%
    noise = noise_like(posterior, generator)
    return posterior.mean + (0.5 * posterior.logvar).exp() * (noise - noise.mean()) / noise.std()


def without_gradient(posterior, generator=None):
    with torch.no_grad():
        return DiagonalGaussian.sample(posterior, generator)


def gradient_of_the_mean_alone(posterior, generator=None):
    std = torch.exp(0.5 * posterior.logvar).detach()
    return posterior.mean + std * noise_like(posterior, generator)


def rsample(posterior, generator=None):
    return torch.distributions.Normal(posterior.mean, posterior.logvar.div(2).exp()).rsample()


def rsample_with_generator(posterior, generator=None):
    normal = torch.distributions.Normal(posterior.mean, posterior.logvar.div(2).exp())
    return normal.rsample(generator=generator)


def mean_stretched_too(posterior, generator=None):
    return (posterior.mean + noise_like(posterior, generator)) * posterior.logvar.div(2).exp()


def floor_under_the_std(posterior, generator=None):  # off by less than 10%
    std = torch.exp(0.5 * posterior.logvar) + 0.01
    return posterior.mean + std * noise_like(posterior, generator)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda p, generator=None: p.mode(), "no noise was added"),
        (with_std(torch.exp), "takes the variance for"),
        (with_std(lambda logvar: logvar), "takes the log variance for"),
        (with_std(lambda logvar: 0.5 * logvar), "exponential is missing"),
        (with_std(lambda logvar: 0.5 * logvar.exp()), "halves the variance"),
        (with_std(lambda logvar: torch.exp(-0.5 * logvar)), "sign turned"),
        (with_std(torch.sqrt), "not a number"),
        (
            lambda p, generator=None: (
                p.mean + torch.exp(0.5 * p.logvar) * torch.randn((), generator=generator)
            ),
            "same noise to all values",
        ),
        (with_std(torch.ones_like), "standard deviation 1, whatever"),
        (
            lambda p, generator=None: torch.exp(0.5 * p.logvar) * noise_like(p, generator),
            "the mean is missing",
        ),
        (uniform, "uniform"),
        (one_for_the_batch, "same noise to all images"),
        (standardised, "those of chance"),
        (seed_ignored, "hand on the generator"),
        (rsample, r"torch.randn\(..., generator=generator\)"),
        (rsample_with_generator, r"takes none; the noise is `torch.randn"),
        (without_gradient, "no gradient reaches posterior.mean"),
        (gradient_of_the_mean_alone, "no gradient reaches posterior.logvar"),
        (mean_stretched_too, "moves by .* where the mean moves by 1"),
        (with_std(lambda logvar: torch.exp(2 * logvar)), "0.0183 where the log variance is -2"),
        (with_std(lambda logvar: logvar.abs().sqrt()), "1.41 where the log variance is -2"),
        (floor_under_the_std, "0.378 where the log variance is -2, expected 0.368"),
    ],
)
def test_sample(wrong, message):
    with pytest.raises(Failed, match=message):
        check.sample(wrong)


def test_sample_must_leave_the_posterior_alone():
    def in_place(posterior, generator=None):
        with torch.no_grad():
            posterior.mean += 1
        return DiagonalGaussian.sample(posterior, generator)

    with pytest.raises(Failed, match="changed the posterior"):
        check.sample(in_place)


def kl_of(term, reduce=lambda x: x.sum((1, 2, 3))):
    """A KL divergence from its term, a function of mean, variance and log variance."""
    return lambda p: reduce(0.5 * term(p.mean, p.logvar.exp(), p.logvar))


def right(m, variance, logvar):
    return m**2 + variance - 1 - logvar


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (kl_of(right, lambda x: x.sum()), "whole batch"),
        (kl_of(right, lambda x: x.sum((1, 2, 3)).mean()), "batch's mean"),
        (kl_of(right, lambda x: x.mean((1, 2, 3))), "expected their sum"),
        (kl_of(right, lambda x: x.sum(1)), "channels alone"),
        (kl_of(right, lambda x: x), "not summed"),
        (kl_of(lambda *a: 2 * right(*a)), "factor 1/2"),
        (kl_of(lambda *a: -right(*a)), "never negative"),
        (kl_of(lambda m, v, log: m**2 + v - log), "lacks the term -1"),
        (kl_of(lambda m, v, log: m**2 - 1 - log), "lacks the variance"),
        (kl_of(lambda m, v, log: v - 1 - log), "lacks the mean"),
        (kl_of(lambda m, v, log: m**2 + v**2 - 1 - log), "squares the variance"),
        (kl_of(lambda m, v, log: m + v - 1 - log), "does not square"),
        (kl_of(lambda m, v, log: m**2 + v - 1 + log), "wrong sign"),
        # off by less than 10%
        (kl_of(lambda m, v, log: m**2 + v.sqrt() - 1 - log), "where the variance belongs"),
        (kl_of(lambda m, v, log: m**2 + v - 1 - log / 2), "log of the standard deviation"),
        (kl_of(lambda m, v, log: (1 + m**2) / v - 1 + log), "other way round"),
        (kl_of(lambda *a: right(*a) / math.log(2)), "bits"),
        (kl_of(lambda m, v, log: right(m - m.mean(0), v, log)), "distance is from 0"),
        (kl_of(lambda m, v, log: m**2 + log - 1 - log.log()), "log variance for the variance"),
        (kl_of(lambda m, v, log: m**2 + log - 1 - log), "log variance for the variance"),
        (kl_of(lambda m, v, log: m**2 + log**2 - 1 - log), "log variance for the standard"),
        (kl_of(lambda m, v, log: m**2 + log**2 - 1 - (log**2).log()), "for the standard deviation"),
        (kl_of(lambda *a: 1.01 * right(*a)), "only the mean is not .* is .*, expected"),
        (kl_of(lambda m, v, log: m**2 + 1.01 * v - 1 - log), "which costs nothing"),
    ],
)
def test_kl(wrong, message):
    with pytest.raises(Failed, match=message):
        check.kl(wrong)


def test_the_kl_with_a_standard_deviation_is_off_by_little():
    posterior = check._posterior()
    near = kl_of(lambda m, v, log: m**2 + v.sqrt() - 1 - log)(posterior)
    assert (near / posterior.kl() - 1).abs().max() < 0.1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x: x.std(), "standard deviation itself"),
        (lambda x: 0.2325, "KL-16"),
        (lambda x: 1 / x.var().item(), "1 / variance"),
        (lambda x: 1 / x.square().mean().sqrt(), "root mean square"),
        (lambda x: 1 / x.abs().mean(), "mean size"),
        (lambda x: 1 / x.abs().max(), "largest value"),
        (lambda x: 1 / x.std((0, 2, 3)).mean(), "averages the channels' standard"),
        (lambda x: (1 / x.std((0, 2, 3))).mean(), "averages the channels' scales"),
        (lambda x: 1 / x.std((1, 2, 3)).mean(), "averages over the images"),  # less than 10% off
        (lambda x: (1 / x.std((1, 2, 3))).mean(), "averages the images' scales"),
        (lambda x: 1 / x[0].std(), "first image only"),
        (lambda x: 1 / x.std((0, 2, 3)), r"shape \(4,\), expected one number"),
        (lambda x: [1 / x.std()], "is a list"),
        (lambda x: 1.01 / x.std(), "is .*, expected"),
        (lambda x: 1 / x.std(), "is a tensor, expected a float"),
    ],
)
def test_latent_scale(wrong, message):
    with pytest.raises(Failed, match=message):
        check.latent_scale(wrong)


def test_right_solutions_pass():
    def mine(posterior, generator=None):
        noise = torch.empty_like(posterior.mean).normal_(generator=generator)
        return posterior.mean + posterior.logvar.exp().sqrt() * noise

    def other_kl(posterior):
        standard = torch.distributions.Normal(0.0, 1.0)
        own = torch.distributions.Normal(posterior.mean, torch.exp(0.5 * posterior.logvar))
        return torch.distributions.kl_divergence(own, standard).flatten(1).sum(1)

    def biased(latents):
        return 1 / float(latents.std(correction=0))

    assert check.sample(mine) is mine
    assert check.kl(other_kl) is other_kl
    assert check.latent_scale(biased) is biased


@pytest.mark.parametrize("name", ["sample", "kl", "latent_scale"])
def test_references_pass(name, capsys):
    exercise = getattr(check, name)
    assert exercise(exercise.reference) is exercise.reference
    assert "passed" in capsys.readouterr().out


def test_latent_scale_gives_latents_a_standard_deviation_of_one():
    latents = 4.3 * torch.randn(20, 4, 8, 8, generator=torch.Generator().manual_seed(0)) + 2
    scaled = latents * latent_scale(latents)
    assert abs(float(scaled.std()) - 1) < 1e-5 and float(scaled.mean()) > 0.4
