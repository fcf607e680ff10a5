"""Checks of chapter 9: the distance of two clouds, its floor, its interval, and the class found."""

import re
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from mar_mini import evaluation
from mar_mini.checks import Failed, close, exercise, refuse_mistakes, same_shape


def _call(candidate, what: str, hint: str, *given: Tensor, **named: object) -> object:
    """What comes of copies of the tensors, which must stay as they are; a hint where it breaks."""
    copies = [x.clone() for x in given]
    try:
        got = candidate(*copies, **named)
    except (RuntimeError, IndexError) as error:
        if re.search("size|shape|dimension|mat1", str(error)):
            error.args = (f"{what}: the shapes do not fit; {hint} ({error})",)
        raise
    for x, copy in zip(given, copies, strict=True):
        if not torch.equal(x, copy):
            raise Failed(f"{what} changed a tensor it was given; write into a new one")
    return got


def _number(got: object, what: str) -> Tensor:
    """A number, or a tensor that is one, as float64."""
    if isinstance(got, complex) or (isinstance(got, Tensor) and got.is_complex()):
        raise Failed(f"{what} is complex: take the real part of the eigenvalues first")
    if not isinstance(got, (Real, Tensor)):
        kind = "None" if got is None else f"of type {type(got).__name__}"
        raise Failed(f"{what} is {kind}, expected a number")
    got = torch.as_tensor(float(got)) if isinstance(got, Real) else got
    same_shape(got, (), what)
    return got.detach().double()


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.double().mean(0), torch.cov(x.double().T)


def _root_trace(product: Tensor) -> Tensor:
    return torch.linalg.eigvals(product).real.clamp(min=0).sqrt().sum()


def _clouds() -> list[tuple[Tensor, Tensor]]:
    """Pairs of clouds of unequal sizes whose numbers go together, each pair in its own way."""
    seeded = torch.Generator().manual_seed(9)

    def cloud(n: int, d: int, shift: float) -> Tensor:
        mix = torch.randn(d, d, generator=seeded)
        return torch.randn(n, d, generator=seeded) @ mix + shift * torch.arange(d) + 0.5

    return [(cloud(30, 4, 0.3), cloud(50, 4, 0.8)), (cloud(12, 6, -0.5), cloud(9, 6, 0.2))]


@exercise(reference=evaluation.frechet_distance)
def frechet_distance(candidate):
    hint = "`torch.cov` wants a row for each of the D numbers: give it `a.T`"
    for a, b in _clouds():
        what = f"frechet_distance of {len(a)} and {len(b)} images with {a.shape[1]} numbers"
        got = _number(_call(candidate, what, hint, a, b), what)
        _call(candidate, what, hint, a.double(), b.double())  # no copies where double() makes none
        if got.isnan():
            raise Failed(
                f"{what} is nan: rounding makes an eigenvalue slightly negative, and its root is "
                "not a number; clamp them at 0"
            )
        refuse_mistakes(
            got,
            torch.tensor(evaluation.frechet_distance(a, b)).double(),
            _wrong_distances(a, b),
            what,
        )
        close(got, evaluation.frechet_distance(a, b), what, rtol=1e-4, atol=1e-4)
    # fewer images than numbers: most eigenvalues are 0, give or take the rounding
    few, many = (torch.randn(n, 40, generator=torch.Generator().manual_seed(n)) for n in (15, 90))
    what = "frechet_distance of fewer images (15) than numbers (40)"
    got = _number(_call(candidate, what, hint, few, many), what)
    if not got.isfinite():
        raise Failed(
            f"{what} is {got:.3g}: some eigenvalues are 0 here, and rounding makes them slightly "
            "negative; clamp them at 0 before the root"
        )
    close(got, evaluation.frechet_distance(few, many), what, rtol=1e-3)
    seeded = torch.Generator().manual_seed(1)
    large, shift = torch.randn(2, 200, 40, generator=seeded)
    what = "frechet_distance of two clouds that are nearly the same"
    near = (100 * large, 100 * large + 0.01 * shift)
    want, got = evaluation.frechet_distance(*near), _number(candidate(*near), what)
    if abs(float(got) - want) > 0.01:
        raise Failed(
            f"{what} is {float(got):.4f}, expected {want:.4f}: in float32 small differences of "
            "large numbers are lost; begin with a.double(), b.double()"
        )
    # whole numbers, which float32 still holds, though not their mean
    far = 1e6 + (3 * large).round()
    near = (far, far + (torch.arange(len(far)) % 8 == 0).float()[:, None])
    what = "frechet_distance of two clouds far from 0"
    want, got = evaluation.frechet_distance(*near), _number(candidate(*near), what)
    if abs(float(got) - want) > 0.01 * want:
        raise Failed(
            f"{what} is {float(got):.4f}, expected {want:.4f}: means and covariances in float32 "
            "are off before a later double() can help; begin with a.double(), b.double()"
        )


def _wrong_distances(a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """What a wrong idea of the distance gives, by the sentence that names it."""
    (mean_a, cov_a), (mean_b, cov_b) = _moments(a), _moments(b)
    n, m, d = len(a), len(b), a.shape[1]
    means = (mean_a - mean_b).square().sum()
    traces, root = cov_a.trace() + cov_b.trace(), _root_trace(cov_a @ cov_b)
    spreads = traces - 2 * root
    std_a, std_b = cov_a.diagonal().sqrt(), cov_b.diagonal().sqrt()
    biased_a, biased_b = cov_a * (n - 1) / n, cov_b * (m - 1) / m
    raw_a, raw_b = (x.double().T @ x.double() / len(x) for x in (a, b))
    cor_a, cor_b = (c / s[:, None] / s for c, s in ((cov_a, std_a), (cov_b, std_b)))
    wrong = {
        "compares the means only: the covariances are missing": means,
        "compares the covariances only: the distance of the means is missing": spreads,
        "forgets the 2 in front of the root": means + traces - root,
        "leaves out the root's term: two equal clouds would not be at 0": means + traces,
        "adds the root's term; it is taken off": means + traces + 2 * root,
        "takes the length of the difference of the means; the formula has its square": (
            means.sqrt() + spreads
        ),
        "takes the mean of the squared differences of the means; the formula has their sum": (
            means / d + spreads
        ),
        "sums the differences of the means before squaring; square each first": (
            (mean_a - mean_b).sum().square() + spreads
        ),
        "takes the root of each entry of the product; the root of a matrix is that which times "
        "itself gives it": means + traces - 2 * (cov_a @ cov_b).clamp(min=0).sqrt().trace(),
        "has no root: the trace of the product itself": means
        + traces
        - 2 * (cov_a @ cov_b).trace(),
        "takes the root of the trace; the trace of the root is the sum of the roots of the "
        "eigenvalues": means + traces - 2 * (cov_a @ cov_b).trace().clamp(min=0).sqrt(),
        "multiplies the covariances entry by entry; the formula has the product of matrices, @": (
            means + traces - 2 * _root_trace(cov_a * cov_b)
        ),
        "compares the spread of each number alone; the covariance also says which go together": (
            means + (std_a - std_b).square().sum()
        ),
        "takes the roots of the two covariances' eigenvalues apart; the eigenvalues of the product "
        "are needed": means
        + (
            torch.linalg.eigvalsh(cov_a).clamp(min=0).sqrt()
            - torch.linalg.eigvalsh(cov_b).clamp(min=0).sqrt()
        )
        .square()
        .sum(),
        "takes eigvalsh of the product, which is not symmetric: it looks at one half alone; take "
        "eigvals": means
        + traces
        - 2 * torch.linalg.eigvalsh(cov_a @ cov_b).clamp(min=0).sqrt().sum(),
        "divides the covariances by N; with N - 1, as torch.cov does, they are right on average": (
            means + biased_a.trace() + biased_b.trace() - 2 * _root_trace(biased_a @ biased_b)
        ),
        "does not take the means off before the covariances: then they count twice": (
            means + raw_a.trace() + raw_b.trace() - 2 * _root_trace(raw_a @ raw_b)
        ),
        "takes correlations; covariances keep how far the numbers spread": (
            means + 2 * d - 2 * _root_trace(cor_a @ cor_b)
        ),
        "gives the root of the distance; by custom it stays squared": (means + spreads).sqrt(),
        "divides by the number of features; the formula does not": (means + spreads) / d,
    }
    return {idea: value.double() for idea, value in wrong.items()}


def _same_state(call, what: str) -> None:
    """Expect that chance comes from the generator alone."""
    runs = []
    for state, elsewhere in ((3, 0), (3, 1), (4, 1)):
        torch.manual_seed(elsewhere)
        before = torch.get_rng_state()
        runs.append(call(torch.Generator().manual_seed(state)))
        if not torch.equal(before, torch.get_rng_state()):
            raise Failed(
                f"{what} draws from torch's global random state; hand `generator=generator` on"
            )
    if runs[0] != runs[1]:
        raise Failed(f"{what} gives two results for one state of the generator; draw from it alone")
    if runs[0] == runs[2]:
        raise Failed(
            f"{what} draws the same for every generator: hand on the one that is given, and make "
            "none of your own"
        )


DRAWS = 60  # of a floor: an image that may come into a set comes in one of them, but for 1 in 10^6


@exercise(reference=evaluation.floor)
def floor(candidate):
    total = 23
    real = torch.stack([torch.arange(total), torch.arange(total) // 8], 1).float()  # id, class
    for n, m in ((5, 9), (9, 5), (6, 17)):
        what, drawn = f"floor(real, {n}, {m}) of {total} images", []

        def distance(a: Tensor, b: Tensor, drawn=drawn) -> float:
            if any((x[:, 1] != x[:, 0] // 8).any() for x in (a, b)):
                raise Failed("floor shuffles each column by itself; a row is one image and stays")
            drawn.append([x[:, 0].long().tolist() for x in (a, b)])
            return float(len(drawn)) + 0.25

        for state in range(DRAWS):
            seeded = torch.Generator().manual_seed(state)
            got = _call(
                lambda x, n=n, m=m, **named: candidate(x, n, m, **named),
                what,
                "take rows of `real`, n and m of them",
                real,
                distance=distance,
                generator=seeded,
            )
            if len(drawn) == state:
                raise Failed(f"{what} never calls the `distance` it was given")
            if len(drawn) > state + 1:
                raise Failed(f"{what} calls `distance` {len(drawn) - state} times, expected once")
            _good_sets(*drawn[-1], n, m, total, what)
            number = _number(got, what)
            if float(number) != state + 1.25:
                raise Failed(f"{what} is {float(number):g}, not what `distance` gave")
        if all(sorted(a) == list(range(n)) for a, _ in drawn):
            raise Failed(
                f"{what} takes the first rows in every draw: images sorted by class would be of one"
            )
        if all(a == drawn[0][0] for a, _ in drawn):
            raise Failed(f"{what} draws the same for every generator: hand `generator` on")
        _good_chances(drawn, n, m, total, what)

    def first_set(generator):
        kept = []
        candidate(
            real,
            5,
            9,
            distance=lambda a, b: float(len(kept.extend([a, b]) or kept)),
            generator=generator,
        )
        return [x.tolist() for x in kept]

    _same_state(first_set, "floor(real, 5, 9)")


def _good_sets(a: list[int], b: list[int], n: int, m: int, total: int, what: str) -> None:
    """Expect n and m images, none twice."""
    if (len(a), len(b)) == (m, n):
        raise Failed(f"{what} hands the {m} first; the {n} that stand in for samples come first")
    if len(b) == total != m:
        raise Failed(
            f"{what} compares with all {total} images, those in the first set among them; expected "
            f"{m} others"
        )
    if (len(a), len(b)) == (n, total - n) != (n, m):
        raise Failed(f"{what} compares with all {total - n} that are left, expected {m} of them")
    if len(a) == len(b) != m:
        raise Failed(f"{what} makes two sets of {len(a)}; expected {n} and {m}")
    if (len(a), len(b)) != (n, m):
        raise Failed(f"{what} makes sets of {len(a)} and {len(b)}, expected {n} and {m}")
    if len(set(a)) < n or len(set(b)) < m:
        raise Failed(
            f"{what} draws an image twice into one set: deal the images out like cards, with "
            "torch.randperm"
        )
    both = set(a) & set(b)
    if both:
        raise Failed(
            f"{what} has {len(both)} images in both sets: what is compared with itself looks "
            "nearer than it is; take the next ones of the same shuffle"
        )


def _good_chances(drawn: list[list[list[int]]], n: int, m: int, total: int, what: str) -> None:
    """Expect that each image may come into each set, and not with its neighbours."""
    if n + m < total and all(max(a + b) < n + m for a, b in drawn):
        raise Failed(
            f"{what} shuffles the first {n + m} rows alone: images sorted by class would be of one "
            f"or two; shuffle all {total}"
        )
    runs = [
        all((j - i) % total == 1 for i, j in zip(x, x[1:], strict=False))
        for pair in drawn
        for x in pair
    ]
    if all(runs):
        raise Failed(
            f"{what} takes a run of neighbours from a random row on: images sorted by class would "
            "be of one or two; shuffle all rows"
        )
    for place, rows in zip(("first", "second"), zip(*drawn, strict=True), strict=True):
        never = set(range(total)).difference(*rows)
        if never:
            raise Failed(
                f"{what}: image {max(never)} never comes into the {place} set, in {len(drawn)} "
                "draws; each image must be able to come into either"
            )


@exercise(reference=evaluation.bootstrap)
def bootstrap(candidate):
    for n, rounds, level in ((7, 41, 0.9), (12, 25, 0.5), (400, 30, 0.95)):
        what = f"bootstrap(measure, {n}, rounds={rounds}, level={level})"
        seeded = torch.Generator().manual_seed(n)
        values = torch.randn(rounds, generator=seeded).double().exp() - 3
        drawn = []

        def measure(rows: Tensor, drawn=drawn, values=values) -> float:
            drawn.append(rows)
            return float(values[(len(drawn) - 1) % len(values)])

        got = candidate(measure, n, rounds=rounds, level=level, generator=seeded)
        if not drawn:
            raise Failed(f"{what} never calls `measure`")
        if len(drawn) == rounds + 1 and any(torch.equal(x, torch.arange(n)) for x in drawn):
            raise Failed(
                f"{what} measures all {n} images besides the draws; the interval asked for lies "
                "between quantiles of what the draws give, neither moved to the value nor mirrored"
            )
        if len(drawn) != rounds:
            raise Failed(f"{what} measures {len(drawn)} draws, expected {rounds}")
        _good_draws(drawn, n, what)
        got = _pair(got, what)
        want = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
        _good_ends(got, values, want, level, what)

    def ends(generator):
        return tuple(
            float(x)
            for x in candidate(
                lambda rows: float(rows.double().square().mean()),
                50,
                rounds=11,
                generator=generator,
            )
        )

    _same_state(ends, "bootstrap(measure, 50)")


def _pair(got: object, what: str) -> Tensor:
    got = torch.from_numpy(got) if isinstance(got, np.ndarray) else got
    if isinstance(got, Tensor):
        same_shape(got, (2,), what)
        return got.double()
    if not isinstance(got, (tuple, list)) or len(got) != 2:
        raise Failed(f"{what} is {got!r}, expected both ends: (low, high)")
    return torch.stack([_number(x, f"an end of {what}") for x in got])


def _good_draws(drawn: list[Tensor], n: int, what: str) -> None:
    """Expect draws of n rows with replacement, another each time."""
    for rows in drawn:
        same_shape(rows, (n,), f"a draw of {what}")
        if rows.dtype != torch.int64:
            raise Failed(f"a draw of {what} has dtype {rows.dtype}, expected int64: which images")
        if rows.min() < 0 or rows.max() >= n:
            raise Failed(f"a draw of {what} has image {int(rows.max())}; there are 0 to {n - 1}")
    if all(torch.equal(rows, drawn[0]) for rows in drawn[1:]):
        raise Failed(f"{what} measures one draw again and again; make a new one each round")
    if all(len(rows.unique()) == n for rows in drawn):
        raise Failed(
            f"{what} draws without replacement: each draw is all images in another order, and any "
            "measure of a set gives the same; use torch.randint"
        )
    if n > 10 and torch.equal(drawn[0], torch.arange(n)):  # a sorted draw of few may be that
        raise Failed(f"{what} begins with all images in turn; every draw is with replacement")
    always = [i for i in range(n) if all((rows == i).any() for rows in drawn)]
    if always and n < 10:  # with many images and few draws one may be in all by chance
        raise Failed(f"{what} has image {always[0]} in every draw; each image may be left out")
    missing = n - len(torch.cat(drawn).unique())
    if missing:
        raise Failed(
            f"{what}: {missing} of the {n} images are in no draw; draw from 0 to {n - 1}, each "
            "equally likely"
        )


def _good_ends(got: Tensor, values: Tensor, at: Tensor, level: float, what: str) -> None:
    want, mean, std = values.quantile(at), values.mean(), values.std()
    z = torch.distributions.Normal(0.0, 1.0).icdf(at[1]).double()
    error = std / len(values) ** 0.5
    one = torch.tensor([1 - level, level], dtype=torch.float64)
    mistakes = {
        "gives the higher end first": want.flip(0),
        f"leaves out {1 - level:.2g} on each side; together both sides are that much": (
            values.quantile(one)
        ),
        f"leaves out {1 - level:.2g} on each side, and has the higher end first": (
            values.quantile(one.flip(0))
        ),
        "leaves everything out on one side: from the lowest value": (
            torch.stack([values.min(), values.quantile(level)])
        ),
        "leaves everything out below: up to the highest value": (
            torch.stack([values.quantile(1 - level), values.max()])
        ),
        "goes from the lowest to the highest value; leave out as the level says": (
            torch.stack([values.min(), values.max()])
        ),
        "gives quantiles for another level; `level` is an argument": (
            values.quantile(torch.tensor([0.025, 0.975]).double())
        ),
        "takes mean and standard deviation; the values need not be normal, take quantiles": (
            torch.stack([mean - z * std, mean + z * std])
        ),
        "takes mean and two standard deviations; the values need not be normal, take quantiles": (
            torch.stack([mean - 2 * std, mean + 2 * std])
        ),
        "takes mean and 1.96 standard deviations; the values need not be normal, take quantiles": (
            torch.stack([mean - 1.96 * std, mean + 1.96 * std])
        ),
        "gives how well the mean is known, dividing by the root of the rounds; more rounds must "
        "not make the interval narrow": torch.stack([mean - 2 * error, mean + 2 * error]),
        "gives mean and spread, expected both ends": torch.stack([mean, std]),
        "takes the differences from the mean off": want - mean,
    }
    # quantiles between two values may be taken either way
    near = torch.stack([values.quantile(at, interpolation=i) for i in ("lower", "higher")])
    if not ((got >= near.amin(0) - 1e-6) & (got <= near.amax(0) + 1e-6)).all():
        refuse_mistakes(got, want, mistakes, what)
        close(got, want, what)


@exercise(reference=evaluation.class_accuracy)
def class_accuracy(candidate):
    cases = [
        ([0, 1, 1, 2, 2, 2, 0, 1, 2, 4, 2], [0, 0, 1, 1, 2, 2, 2, 0, 2, 2, 2], 5),
        ([3, 3, 0, 1, 3, 0, 2, 1], [3, 1, 0, 1, 3, 0, 1, 3], 4),
        ([1, 1, 1], [0, 1, 0], 2),
    ]
    for taken, asked, classes in cases:
        taken, asked = torch.tensor(taken), torch.tensor(asked)
        what = f"class_accuracy(taken, asked, {classes}) of {len(taken)} images"
        hint = "`torch.bincount(x, minlength=classes)` has a count for each class"
        got = _call(lambda *x, k=classes: candidate(*x, k), what, hint, taken, asked)
        if isinstance(got, float) or (isinstance(got, Tensor) and got.ndim == 0):
            raise Failed(f"{what} gives one number; expected a share for each class")
        if isinstance(got, Tensor) and len(got) < classes:
            raise Failed(
                f"{what} has {len(got)} shares, expected {classes}: a class nobody asked for has "
                "its place too (minlength)"
            )
        same_shape(got, (classes,), what)
        want = evaluation.class_accuracy(taken, asked, classes)
        right = torch.bincount(asked[taken == asked], minlength=classes).double()
        by_asked = torch.bincount(asked, minlength=classes).double()
        by_taken = torch.bincount(taken, minlength=classes).double()
        overall = (taken == asked).double().mean()
        in_turn = (taken.sort().values == asked.sort().values).double()
        mistakes = {
            "counts; expected shares, from 0 to 1": right,
            "divides by how many are taken for the class; divide by how many were asked for": (
                right / by_taken
            ),
            "divides by all images; divide by those that were asked for as this class": (
                right / len(taken)
            ),
            "divides by the number of classes; divide by those asked for as this class": (
                right / classes
            ),
            "divides by how many are right in all; that is where the right ones lie": (
                right / right.sum()
            ),
            "gives the share of all for each class": overall.expand(classes),
            "compares how often a class is taken with how often it was asked for; each image must "
            "be compared with what was asked of it": by_taken / by_asked,
            "sorts both first; each image must be compared with what was asked of it": (
                torch.bincount(asked.sort().values, in_turn, minlength=classes) / by_asked
            ),
            "divides by those asked for or taken for it; divide by how many were asked for": (
                right / (by_asked + by_taken - right)
            ),
            "divides by the mean of how many were asked for and taken for the class; divide by how "
            "many were asked for": 2 * right / (by_asked + by_taken),
            "gives the share that is wrong": 1 - want,
            "rounds down to whole numbers: divide floats": right // by_asked.clamp(min=1),
        }
        nan = want.isnan()
        got = got.detach()
        refuse_mistakes(got[~nan], want[~nan], {k: v[~nan] for k, v in mistakes.items()}, what)
        placed = torch.where(nan, want, got.double())
        shares = [x.double().nan_to_num(2).sort().values for x in (got, want)]
        if torch.allclose(*shares) and not torch.allclose(placed, want, equal_nan=True):
            raise Failed(f"{what} has the right shares in the wrong places: class k is at place k")
        close(placed, want, what)
        known = nan & ~got.isnan()
        if known.any():
            raise Failed(
                f"{what} gives a class that nobody asked for {got[known][0]:.3g}; nothing is known "
                "of it: nan"
            )
