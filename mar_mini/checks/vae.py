"""Checks of chapter 2: a draw from a posterior, its KL divergence, the scale of latents."""

import math

import torch

from mar_mini import vae
from mar_mini.checks import Failed, close, exercise, refuse_mistakes, same_dtype, same_shape
from mar_mini.vae import DiagonalGaussian


def _posterior() -> DiagonalGaussian:
    """Means around 1, log variances from -3 to 1: every term of the KL counts."""
    generator = torch.Generator().manual_seed(2)
    mean = 1 + torch.randn(3, 4, 5, 6, generator=generator)
    logvar = 4 * torch.rand(3, 4, 5, 6, generator=generator) - 3
    return DiagonalGaussian(torch.cat([mean, logvar], dim=1))


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def _level(mean: float, logvar: float, shape: tuple[int, ...] = (1, 1, 1, 1)) -> DiagonalGaussian:
    """All values of one mean and one log variance."""
    ones = torch.ones(shape)
    return DiagonalGaussian(torch.cat([mean * ones, logvar * ones], dim=1))


def _draw(candidate, posterior: DiagonalGaussian, what: str) -> torch.Tensor:
    """A learner's draw; raises `Failed` if it gives a generator to a function without one."""
    try:
        return candidate(posterior, _seeded())
    except TypeError as error:
        if "keyword argument 'generator'" not in str(error):
            raise
        raise Failed(
            f"{what} hands the generator to a function that takes none; the noise is "
            "`torch.randn(..., generator=generator)`"
        ) from error


def _diagnose_draw(candidate, got: torch.Tensor, posterior: DiagonalGaussian, what: str) -> None:
    """Say which part of mean + std * noise is wrong: the mean, or the standard deviation."""
    moved = DiagonalGaussian(torch.cat([posterior.mean + 1, posterior.logvar], dim=1))
    by = (candidate(moved, _seeded()) - got).detach()
    if not torch.allclose(by, torch.ones(()), atol=1e-4):
        at = by.flatten()[(by - 1).abs().argmax()]
        raise Failed(
            f"{what} moves by {at:.3g} in a place where the mean moves by 1: add the mean as it "
            "is, and stretch nothing but the noise"
        )
    level = _level(0.0, -2.0, got.shape)
    std = (candidate(level, _seeded()) / torch.randn(got.shape, generator=_seeded())).detach()
    first, want = float(std.flatten()[0]), math.exp(-1)
    same = torch.allclose(std, std.flatten()[0], rtol=1e-3)  # else the noise is another
    if same and not math.isclose(first, want, rel_tol=1e-3):
        raise Failed(
            f"{what} has standard deviation {first:.3g} where the log variance is -2, expected "
            f"{want:.3g}: the log of the standard deviation is half the log variance"
        )


@exercise(reference=DiagonalGaussian.sample)
def sample(candidate):
    what, posterior = "sample(posterior, generator)", _posterior()
    mean, logvar = posterior.mean.requires_grad_(), posterior.logvar.requires_grad_()
    before = mean.detach().clone(), logvar.detach().clone()
    got = _draw(candidate, posterior, what)
    same_shape(got, mean.shape, what)
    same_dtype(got, torch.float32, what)
    if got.isnan().any():
        raise Failed(f"{what} is not a number in places: logvar may be negative and has no root")
    if not (torch.equal(mean, before[0]) and torch.equal(logvar, before[1])):
        raise Failed(f"{what} changed the posterior it was given; make new tensors")
    noise = torch.randn(mean.shape, generator=_seeded())
    want = mean + torch.exp(0.5 * logvar) * noise
    std, small = logvar.exp().sqrt(), torch.randn(mean.shape[1:], generator=_seeded())
    mistakes = {
        "is the mean: no noise was added": mean,
        "is noise alone: the mean is missing": std * noise,
        "adds noise of standard deviation 1, whatever the posterior says": mean + noise,
        "takes the variance for the standard deviation; that is its root": (
            mean + logvar.exp() * noise
        ),
        "takes the log variance for the standard deviation": mean + logvar * noise,
        "takes half the log variance for the standard deviation; the exponential is missing": (
            mean + 0.5 * logvar * noise
        ),
        "halves the variance outside of the exponential; the half belongs into it, to take the "
        "root": mean + 0.5 * logvar.exp() * noise,
        "has the log variance's sign turned": mean + torch.exp(-0.5 * logvar) * noise,
        "draws from a uniform distribution, expected a normal one": (
            mean + std * torch.rand(mean.shape, generator=_seeded())
        ),
        "adds the same noise to all values; draw one for each": (
            mean + std * torch.randn((), generator=_seeded())
        ),
        "adds the same noise to all images of the batch; draw one for each": mean + std * small,
        "makes the noise's mean 0 and its standard deviation 1 afterwards; a draw has those of "
        "chance": mean + std * (noise - noise.mean()) / noise.std(),
    }
    refuse_mistakes(got, want, mistakes, what)
    if not torch.allclose(got, candidate(posterior, _seeded())):
        raise Failed(
            f"{what} gives another draw for the same seed: hand on the generator; the noise is "
            "`torch.randn(..., generator=generator)` (`rsample` takes none)"
        )
    _diagnose_draw(candidate, got, posterior, what)
    close(got, want, what)
    slopes = [torch.zeros(())] * 2
    if got.requires_grad:
        slopes = torch.autograd.grad(got.sum(), [mean, logvar], allow_unused=True)
    for slope, name in zip(slopes, ("mean", "logvar"), strict=True):
        if slope is None or not slope.any():
            raise Failed(
                f"{what} has the right values, but no gradient reaches posterior.{name}: nothing "
                "could be learned; write mean + std * noise, and nothing else"
            )
    with torch.no_grad():
        torch.manual_seed(3)
        got = candidate(posterior)
        torch.manual_seed(3)
        close(got, DiagonalGaussian.sample(posterior), "sample(posterior), without a generator,")


@exercise(reference=DiagonalGaussian.kl)
def kl(candidate):
    what, posterior = "kl(posterior)", _posterior()
    m, logvar = posterior.mean, posterior.logvar
    variance, axes = logvar.exp(), (1, 2, 3)
    got, want = candidate(posterior), DiagonalGaussian.kl(posterior)
    if isinstance(got, torch.Tensor) and got.isnan().any():
        raise Failed(
            f"{what} is not a number in places: it takes the log variance for the variance, or for "
            "the standard deviation; logvar may be negative, and has no logarithm or root"
        )
    terms = 0.5 * (m**2 + variance - 1 - logvar)
    mistakes = {
        "is summed over the whole batch, expected one number for each image": want.sum(),
        "is the batch's mean, expected one number for each image": want.mean(),
        "is a mean over the latent's values, expected their sum": terms.mean(axes),
        "is summed over the channels alone, expected C, H and W": terms.sum(1),
        "is not summed: one number for each latent value": terms,
        "is twice what it should be: the factor 1/2 is missing": 2 * want,
        "has its sign turned; a KL divergence is never negative": -want,
        "lacks the term -1: it would not be 0 for the standard normal": (want + 0.5 * m[0].numel()),
        "lacks the variance: it does not count how wide the posterior is": (
            want - 0.5 * variance.sum(axes)
        ),
        "lacks the mean, which has to pay for its distance from 0": (
            want - 0.5 * m.square().sum(axes)
        ),
        "does not square the mean": (terms - 0.5 * m**2 + 0.5 * m).sum(axes),
        "has the log variance with the wrong sign": (terms + logvar).sum(axes),
        "takes the standard deviation where the variance belongs": (
            terms + 0.5 * (variance.sqrt() - variance)
        ).sum(axes),
        "takes the log variance for the variance, which is its exponential": (
            0.5 * (m**2 - 1).sum(axes)
        ),
        "takes the log variance for the standard deviation and squares it; the variance is its "
        "exponential": (terms + 0.5 * (logvar.square() - variance)).sum(axes),
        "takes the log variance for the standard deviation": (
            0.5 * (m**2 + logvar.square() - 1 - logvar.square().log())
        ).sum(axes),
        "squares the variance; only the mean is squared": (
            terms + 0.5 * (variance.square() - variance)
        ).sum(axes),
        "subtracts the log of the standard deviation; it is the log of the variance": (
            terms + 0.25 * logvar
        ).sum(axes),
        "is the other way round, from the standard normal to the posterior": (
            0.5 * ((1 + m**2) / variance - 1 + logvar)
        ).sum(axes),
        "is in bits, expected nats": want / math.log(2),
        "has the mean over the batch taken off first; its distance is from 0": (
            0.5 * ((m - m.mean(0)) ** 2 + variance - 1 - logvar)
        ).sum(axes),
    }
    refuse_mistakes(got, want, mistakes, what)
    same_shape(got, want.shape, what)
    cases = {
        (0.0, 0.0): "the standard normal, which costs nothing",
        (1.0, 0.0): "only the mean is not that of the standard normal",
        (0.0, -1.0): "only the variance is not that of the standard normal",
    }
    for (mean, log), case in cases.items():
        one = _level(mean, log)
        label = f"{what} of one value with mean {mean:g} and log variance {log:g} ({case})"
        close(candidate(one)[0], one.kl()[0], label)
    close(got, want, what)


@exercise(reference=vae.latent_scale)
def latent_scale(candidate):
    # channels with a mean and a spread of their own, and pictures too, as real latents have
    generator = torch.Generator().manual_seed(4)
    spread = torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None, None]
    latents = spread * torch.randn(50, 4, 6, 6, generator=generator) + 1.2
    latents = latents + torch.randn(50, 1, 1, 1, generator=generator)
    what, given = "latent_scale(latents)", latents.clone()
    got = candidate(given)
    if not torch.equal(given, latents):
        raise Failed(f"{what} changed the latents it was given")
    if isinstance(got, torch.Tensor) and got.numel() > 1:
        raise Failed(
            f"{what} is a tensor of shape {tuple(got.shape)}, expected one number for all latents: "
            "scales of their own would change how the channels compare"
        )
    if not isinstance(got, (int, float, torch.Tensor)):
        raise Failed(f"{what} is a {type(got).__name__}, expected a float")
    x = latents.double()
    want = torch.tensor(vae.latent_scale(latents)).double()
    mistakes = {
        "is the standard deviation itself; the scale divides by it": x.std(),
        "is 1 / variance, expected 1 / standard deviation": 1 / x.var(),
        "is 1 / root mean square, as if the mean were 0; take the spread around the mean": (
            1 / x.square().mean().sqrt()
        ),
        "is 1 / mean size of the values": 1 / x.abs().mean(),
        "is 1 / largest value, expected 1 / standard deviation": 1 / x.abs().max(),
        "averages the channels' standard deviations; what differs between channels gets lost, take "
        "all values at once": 1 / x.std((0, 2, 3)).mean(),
        "averages the channels' scales, expected 1 / standard deviation of all values": (
            (1 / x.std((0, 2, 3))).mean()
        ),
        "averages over the images; what differs between them gets lost, take all values at once": (
            1 / x.std((1, 2, 3)).mean()
        ),
        "averages the images' scales, expected 1 / standard deviation of all values": (
            (1 / x.std((1, 2, 3))).mean()
        ),
        "is the scale of the published autoencoder, KL-16; each has its own": torch.tensor(0.2325),
        "looks at the first image only; take all": 1 / x[0].std(),
        "looks at the first channel only; take all": 1 / x[:, 0].std(),
    }
    number = torch.as_tensor(got).double().reshape(())
    refuse_mistakes(number, want, mistakes, what)
    close(number, want, what, rtol=1e-3)
    if isinstance(got, torch.Tensor):
        raise Failed(f"{what} has the right value, but is a tensor, expected a float: `float(...)`")
