"""The checks of chapter 9 refuse plausible mistakes, each by the name of its idea."""

import numpy as np
import pytest
import torch

from mar_mini import evaluation
from mar_mini.checks import Failed
from mar_mini.checks import evaluation as check


@pytest.fixture(autouse=True)
def strict(monkeypatch):
    monkeypatch.setenv("MAR_MINI_STRICT", "1")


def parts(a, b):
    """Squared distance of the means, both covariances."""
    a, b = a.double(), b.double()
    return (a.mean(0) - b.mean(0)).square().sum(), torch.cov(a.T), torch.cov(b.T)


def root_trace(product):
    return torch.linalg.eigvals(product).real.clamp(min=0).sqrt().sum()


def right(a, b):
    means, c, d = parts(a, b)
    return means + c.trace() + d.trace() - 2 * root_trace(c @ d)


def by_numpy(a, b):
    a, b = a.double().numpy(), b.double().numpy()
    c, d = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(c @ d).astype(complex)).real.sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(c) + np.trace(d) - 2 * root)


def by_hand(a, b):
    """Covariances by hand, and the root of one of them first."""
    centred = [x.double() - x.double().mean(0) for x in (a, b)]
    c, d = (x.T @ x / (len(x) - 1) for x in centred)
    values, vectors = torch.linalg.eigh(c)
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ d @ root).clamp(min=0).sqrt().sum()
    means = torch.linalg.vector_norm(a.double().mean(0) - b.double().mean(0)) ** 2
    return (means + (c + d).trace() - 2 * cross).item()


def by_singular_values(a, b):
    """The trace of the root is the sum of the singular values of the product of the clouds."""
    c, d = ((x.double() - x.double().mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b))
    cross = torch.linalg.svdvals(c @ d.T).sum()
    return parts(a, b)[0] + c.square().sum() + d.square().sum() - 2 * cross


def of_numpy(a, b):
    return np.float32(by_numpy(a, b))


@pytest.mark.parametrize("way", [right, by_numpy, by_hand, by_singular_values, of_numpy])
def test_ways_of_writing_the_distance(way):
    assert check.frechet_distance(way) is way


def combined(change):
    """The formula with something else in place of its last terms."""
    return lambda a, b: change(*parts(a, b))


def elementwise(means, c, d):
    return means + (c + d - 2 * (c @ d).abs().sqrt()).trace()


def apart(means, c, d):
    """Roots apart: right only if both covariances have the same eigenvectors."""
    roots = [torch.linalg.eigvalsh(x).clamp(min=0).sqrt() for x in (c, d)]
    return means + (roots[0] - roots[1]).square().sum()


def diagonal(means, c, d):
    return means + (c.diagonal().sqrt() - d.diagonal().sqrt()).square().sum()


def centred_in_place(a, b):
    a = a.double()
    mean = a.mean(0)
    a -= mean
    return right(a + mean, b)


def biased(a, b):
    means, c, d = parts(a, b)
    c, d = c * (len(a) - 1) / len(a), d * (len(b) - 1) / len(b)
    return means + c.trace() + d.trace() - 2 * root_trace(c @ d)


def not_centred(a, b):
    c, d = (x.double().T @ x.double() / len(x) for x in (a, b))
    return parts(a, b)[0] + c.trace() + d.trace() - 2 * root_trace(c @ d)


def correlations(a, b):
    c, d = (torch.corrcoef(x.double().T) for x in (a, b))
    return parts(a, b)[0] + c.trace() + d.trace() - 2 * root_trace(c @ d)


def norm_of_means(a, b):
    means = parts(a, b)[0]
    return right(a, b) - means + means.sqrt()


def mean_of_means(a, b):
    means = parts(a, b)[0]
    return right(a, b) - means + means / a.shape[1]


def summed_first(a, b):
    return right(a, b) - parts(a, b)[0] + (a.mean(0) - b.mean(0)).double().sum() ** 2


def not_clamped(a, b):
    means, c, d = parts(a, b)
    return means + c.trace() + d.trace() - 2 * torch.linalg.eigvals(c @ d).real.sqrt().sum()


def still_complex(a, b):
    means, c, d = parts(a, b)
    return means + c.trace() + d.trace() - 2 * torch.linalg.eigvals(c @ d).sqrt().sum()


def in_float32(a, b):
    c, d = torch.cov(a.T), torch.cov(b.T)
    cross = torch.linalg.eigvals(c @ d).real.clamp(min=0).sqrt().sum()
    return (a.mean(0) - b.mean(0)).square().sum() + c.trace() + d.trace() - 2 * cross


def double_too_late(a, b):
    c, d = torch.cov(a.T).double(), torch.cov(b.T).double()
    means = (a.mean(0) - b.mean(0)).double().square().sum()
    return means + c.trace() + d.trace() - 2 * root_trace(c @ d)


def of_one_half(means, c, d):
    """eigvalsh looks at the lower half alone, and the product is not symmetric."""
    cross = torch.linalg.eigvalsh(c @ d).clamp(min=0).sqrt().sum()
    return means + c.trace() + d.trace() - 2 * cross


def transposed(a, b):
    return parts(a, b)[0] + (torch.cov(a) @ torch.cov(b)).trace()


def in_place(a, b):
    want = right(a, b)
    a -= a.mean(0)
    return want


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (combined(lambda m, c, d: m), "the means only"),
        (lambda a, b: right(a - a.mean(0), b - b.mean(0)), "the covariances only"),
        (combined(lambda m, c, d: m + c.trace() + d.trace() - root_trace(c @ d)), "forgets the 2"),
        (combined(lambda m, c, d: m + c.trace() + d.trace()), "leaves out the root's term"),
        (combined(lambda m, c, d: m + (c + d).trace() + 2 * root_trace(c @ d)), "it is taken off"),
        (norm_of_means, "the formula has its square"),
        (mean_of_means, "the formula has their sum"),
        (summed_first, "square each first"),
        (
            combined(lambda m, c, d: m + (c + d).trace() - 2 * (c @ d).clamp(min=0).sqrt().trace()),
            "the root of each entry",
        ),
        (combined(lambda m, c, d: m + (c + d).trace() - 2 * (c @ d).trace()), "has no root"),
        (
            combined(lambda m, c, d: m + (c + d).trace() - 2 * (c @ d).trace().sqrt()),
            "the root of the trace",
        ),
        (combined(lambda m, c, d: m + (c + d).trace() - 2 * root_trace(c * d)), "entry by entry"),
        (combined(diagonal), "also says which go together"),
        (combined(apart), "eigenvalues apart"),
        (biased, r"divides the covariances by N; with N - 1"),
        (not_centred, "they count twice"),
        (correlations, "takes correlations"),
        (lambda a, b: right(a, b).sqrt(), "it stays squared"),
        (lambda a, b: right(a, b) / a.shape[1], "divides by the number of features"),
        (centred_in_place, "changed a tensor it was given"),
        (not_clamped, "clamp them at 0"),
        (still_complex, "take the real part"),
        (in_float32, r"begin with a\.double"),
        (double_too_late, r"before a later double\(\) can help"),
        (combined(of_one_half), "is not symmetric"),
        (lambda a, b: None, "is None, expected a number"),
        (lambda a, b: (right(a, b), 0), "is of type tuple, expected a number"),
        (lambda a, b: complex(right(a, b)), "take the real part"),
        (transposed, r"shapes do not fit; `torch\.cov` wants a row"),
        (in_place, "changed a tensor it was given"),
    ],
)
def test_frechet_distance(wrong, message):
    with pytest.raises(Failed, match=message):
        check.frechet_distance(wrong)


def test_a_mistake_in_the_distance_that_hardly_shows():
    """Dividing by N instead of N - 1 is off by less than a tenth, and refused all the same."""
    a, b = (torch.randn(n, 4, generator=torch.Generator().manual_seed(n)) for n in (30, 50))
    assert 0 < abs(biased(a, b + 1) / right(a, b + 1) - 1) < 0.1


def dealt(real, n, m, generator):
    order = torch.randperm(len(real), generator=generator)
    return real[order[:n]], real[order[n : n + m]]


def right_floor(real, n, m, *, distance, generator=None):
    return distance(*dealt(real, n, m, generator))


def by_split(real, n, m, *, distance, generator=None):
    mixed = real[torch.randperm(len(real), generator=generator)]
    first, second, _ = mixed.split([n, m, len(real) - n - m])
    return torch.tensor(distance(first, second))


def by_sorting(real, n, m, *, distance, generator=None):
    order = torch.rand(len(real), generator=generator).argsort()
    return distance(real[order[-n:]], real[order[:-n][:m]])


def by_what_is_left(real, n, m, *, distance, generator=None):
    """Two draws, the second from what the first has left."""
    first = torch.multinomial(torch.ones(len(real)), n, generator=generator)
    left = torch.ones(len(real), dtype=torch.bool)
    left[first] = False
    rest = real[left]
    return distance(real[first], rest[torch.randperm(len(rest), generator=generator)[:m]])


@pytest.mark.parametrize("way", [right_floor, by_split, by_sorting, by_what_is_left])
def test_ways_of_writing_the_floor(way):
    assert check.floor(way) is way


def two_deals(real, n, m, *, distance, generator=None):
    first = real[torch.randperm(len(real), generator=generator)[:n]]
    return distance(first, real[torch.randperm(len(real), generator=generator)[:m]])


def overlapping(real, n, m, *, distance, generator=None):
    order = torch.randperm(len(real), generator=generator)
    return distance(real[order[:n]], real[order[:m]])


def replaced(real, n, m, *, distance, generator=None):
    draws = [torch.randint(len(real), (k,), generator=generator) for k in (n, m)]
    return distance(real[draws[0]], real[draws[1]])


def to_all(real, n, m, *, distance, generator=None):
    return distance(dealt(real, n, m, generator)[0], real)


def to_the_rest(real, n, m, *, distance, generator=None):
    order = torch.randperm(len(real), generator=generator)
    return distance(real[order[:n]], real[order[n:]])


def of_one_size(real, n, m, *, distance, generator=None):
    return distance(*dealt(real, n, n, generator))


def unshuffled(real, n, m, *, distance, generator=None):
    torch.rand(1, generator=generator)
    return distance(real[:n], real[n : n + m])


def of_the_first(real, n, m, *, distance, generator=None):
    order = torch.randperm(n + m, generator=generator)
    return distance(real[order[:n]], real[order[n:]])


def cut_first(real, n, m, *, distance, generator=None):
    return right_floor(real[: n + m], n, m, distance=distance, generator=generator)


def by_column(real, n, m, *, distance, generator=None):
    mixed = torch.stack([x[torch.randperm(len(x), generator=generator)] for x in real.T], 1)
    return distance(mixed[:n], mixed[n : n + m])


def rolled(real, n, m, *, distance, generator=None):
    mixed = real.roll(int(torch.randint(len(real), (1,), generator=generator)), 0)
    return distance(mixed[:n], mixed[n : n + m])


def sorted_again(real, n, m, *, distance, generator=None):
    order = torch.randperm(len(real), generator=generator)[: n + m].sort().values
    return distance(real[order[:n]], real[order[n:]])


def swapped(real, n, m, *, distance, generator=None):
    return distance(*dealt(real, n, m, generator)[::-1])


def from_elsewhere(real, n, m, *, distance, generator=None):
    return distance(*dealt(real, n, m, None))


def of_its_own(real, n, m, *, distance, generator=None):
    return distance(*dealt(real, n, m, torch.Generator().manual_seed(7)))


def its_own_distance(real, n, m, *, distance, generator=None):
    return evaluation.frechet_distance(*dealt(real, n, m, generator))


def twice(real, n, m, *, distance, generator=None):
    return (
        right_floor(real, n, m, distance=distance, generator=generator)
        + right_floor(real, n, m, distance=distance, generator=generator)
    ) / 2


def rooted(real, n, m, *, distance, generator=None):
    return right_floor(real, n, m, distance=distance, generator=generator) ** 0.5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (two_deals, "in both sets"),
        (overlapping, "in both sets"),
        (replaced, "draws an image twice"),
        (to_all, "compares with all 23 images"),
        (to_the_rest, "compares with all 18 that are left, expected 9"),
        (of_one_size, "makes two sets of 5"),
        (unshuffled, "takes the first rows in every draw"),
        (of_the_first, "shuffles the first 14 rows alone"),
        (cut_first, "shuffles the first 14 rows alone"),
        (by_column, "a row is one image"),
        (rolled, "a run of neighbours"),
        (sorted_again, "image 22 never comes into the first set"),
        (
            lambda *_, distance, generator: (
                right_floor(*_, distance=distance, generator=generator) and None
            ),
            "is None, expected a number",
        ),
        (swapped, "hands the 9 first"),
        (from_elsewhere, "torch's global random state"),
        (of_its_own, "draws the same for every generator"),
        (its_own_distance, "never calls the `distance`"),
        (twice, "calls `distance` 2 times"),
        (rooted, "not what `distance` gave"),
    ],
)
def test_floor(wrong, message):
    with pytest.raises(Failed, match=message):
        check.floor(wrong)


def ends(values, low, high):
    return tuple(torch.tensor(values).double().quantile(torch.tensor([low, high]).double()))


def draws(measure, n, rounds, generator):
    return [measure(torch.randint(n, (n,), generator=generator)) for _ in range(rounds)]


def right_bootstrap(measure, n, *, rounds=100, level=0.95, generator=None):
    return ends(draws(measure, n, rounds, generator), (1 - level) / 2, (1 + level) / 2)


def by_percentile(measure, n, *, rounds=100, level=0.95, generator=None):
    chosen = torch.randint(n, (rounds, n), generator=generator)
    tail = 50 * (1 - level)
    return np.percentile([float(measure(x)) for x in chosen], [tail, 100 - tail]).tolist()


def by_sorted_values(measure, n, *, rounds=100, level=0.95, generator=None):
    values = sorted(draws(measure, n, rounds, generator))
    out = round((1 - level) / 2 * (rounds - 1))
    return values[out], values[-1 - out]


def by_multinomial(measure, n, *, rounds=100, level=0.95, generator=None):
    even = torch.ones(n)
    values = [measure(torch.multinomial(even, n, True, generator=generator)) for _ in range(rounds)]
    return ends(values, (1 - level) / 2, (1 + level) / 2)


def by_whole_places(measure, n, *, rounds=100, level=0.95, generator=None):
    """Leaves out whole values, of few rounds none."""
    values = sorted(draws(measure, n, rounds, generator))
    out = int(rounds * (1 - level) / 2)
    return values[out], values[rounds - 1 - out]


def by_sorted_rows(measure, n, **named):
    return right_bootstrap(lambda rows: measure(rows.sort().values), n, **named)


def as_array(*given, **named):
    return np.array(by_percentile(*given, **named))


@pytest.mark.parametrize(
    "way",
    [
        right_bootstrap,
        by_percentile,
        by_sorted_values,
        by_multinomial,
        by_whole_places,
        by_sorted_rows,
        as_array,
    ],
)
def test_ways_of_writing_the_bootstrap(way):
    assert check.bootstrap(way) is way


def drawing(draw):
    """A bootstrap that draws so: (n, generator) -> rows."""

    def wrong(measure, n, *, rounds=100, level=0.95, generator=None):
        values = [measure(draw(n, generator)) for _ in range(rounds)]
        return ends(values, (1 - level) / 2, (1 + level) / 2)

    return wrong


def ending(end):
    """A bootstrap that makes its ends so: (values, level) -> two numbers."""

    def wrong(measure, n, *, rounds=100, level=0.95, generator=None):
        return end(torch.tensor(draws(measure, n, rounds, generator)).double(), level)

    return wrong


def one_draw(measure, n, *, rounds=100, level=0.95, generator=None):
    rows = torch.randint(n, (n,), generator=generator)
    return ends([measure(rows) for _ in range(rounds)], (1 - level) / 2, (1 + level) / 2)


def too_few(measure, n, *, rounds=100, level=0.95, generator=None):
    return right_bootstrap(measure, n, rounds=20, level=level, generator=generator)


def mirrored(measure, n, *, rounds=100, level=0.95, generator=None):
    low, high = right_bootstrap(measure, n, rounds=rounds, level=level, generator=generator)
    value = measure(torch.arange(n))
    return 2 * value - high, 2 * value - low


def with_the_original(measure, n, *, rounds=100, level=0.95, generator=None):
    values = [measure(torch.arange(n)), *draws(measure, n, rounds - 1, generator)]
    return ends(values, (1 - level) / 2, (1 + level) / 2)


def with_the_first(n, generator):
    return torch.cat([torch.tensor([0]), torch.randint(n, (n - 1,), generator=generator)])


def error_of_the_mean(values, level):
    error = values.std() / len(values) ** 0.5
    return values.mean() - 2 * error, values.mean() + 2 * error


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (drawing(lambda n, g: torch.randperm(n, generator=g)), "without replacement"),
        (drawing(lambda n, g: torch.randint(n, (n // 2,), generator=g)), "has shape"),
        (drawing(lambda n, g: torch.randint(n - 1, (n,), generator=g)), "are in no draw"),
        (drawing(lambda n, g: torch.randint(n + 5, (n,), generator=g)), "there are 0 to"),
        (drawing(lambda n, g: torch.rand(n, generator=g) * n), "expected int64"),
        (drawing(lambda n, g: torch.randint(n, (n,))), "torch's global random state"),
        (
            drawing(
                lambda n, g: torch.randint(n, (n,), generator=torch.Generator().manual_seed(n))
            ),
            "one draw again and again",
        ),
        (one_draw, "one draw again and again"),
        (drawing(with_the_first), "has image 0 in every draw"),
        (with_the_original, "begins with all images in turn"),
        (mirrored, "measures all 7 images besides the draws"),
        (too_few, "measures 20 draws, expected 41"),
        (lambda measure, n, **_: (0.0, 1.0), "never calls `measure`"),
        (
            ending(lambda v, p: tuple(ends(v.tolist(), (1 - p) / 2, (1 + p) / 2))[::-1]),
            "the higher end first",
        ),
        (ending(lambda v, p: ends(v.tolist(), 1 - p, p)), "on each side; together"),
        (ending(lambda v, p: (v.min(), v.quantile(p))), "from the lowest value"),
        (ending(lambda v, p: (v.quantile(1 - p), v.max())), "up to the highest value"),
        (ending(lambda v, p: (v.min(), v.max())), "leave out as the level says"),
        (ending(lambda v, p: ends(v.tolist(), 0.025, 0.975)), "`level` is an argument"),
        (ending(lambda v, p: (v.mean() - 2 * v.std(), v.mean() + 2 * v.std())), "two standard"),
        (ending(lambda v, p: (v.mean() - 1.96 * v.std(), v.mean() + 1.96 * v.std())), "1.96"),
        (ending(error_of_the_mean), "must not make the interval narrow"),
        (ending(lambda v, p: (v.mean(), v.std())), "mean and spread"),
        (ending(lambda v, p: float(v.mean())), "expected both ends"),
    ],
)
def test_bootstrap(wrong, message):
    with pytest.raises(Failed, match=message):
        check.bootstrap(wrong)


def counted(taken, asked, classes):
    hits = [((taken == k) & (asked == k)).sum() for k in range(classes)]
    return torch.stack(hits).float(), torch.bincount(asked, minlength=classes)


def by_loop(taken, asked, classes):
    return torch.stack([(taken[asked == k] == k).float().mean() for k in range(classes)])


def by_table(taken, asked, classes):
    table = torch.zeros(classes, classes)
    table.index_put_((asked, taken), torch.ones(len(asked)), accumulate=True)
    return table.diagonal() / table.sum(1)


@pytest.mark.parametrize("way", [by_loop, by_table, lambda *x: counted(*x)[0] / counted(*x)[1]])
def test_ways_of_writing_the_class_accuracy(way):
    assert check.class_accuracy(way) is way


def over_the_other_axis(taken, asked, classes):
    return counted(taken, asked, classes)[0] / torch.bincount(taken, minlength=classes)


def sorted_first(taken, asked, classes):
    return by_loop(taken.sort().values, asked.sort().values, classes)


def zero_for_none(taken, asked, classes):
    return by_loop(taken, asked, classes).nan_to_num()


def overwrites(taken, asked, classes):
    taken[:] = asked
    return by_loop(taken, asked, classes)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda *x: counted(*x)[0], "counts; expected shares"),
        (over_the_other_axis, "divide by how many were asked for"),
        (lambda t, a, k: counted(t, a, k)[0] / len(t), "divides by all images"),
        (lambda t, a, k: counted(t, a, k)[0] / k, "divides by the number of classes"),
        (lambda t, a, k: counted(t, a, k)[0] / (t == a).sum(), "how many are right in all"),
        (lambda t, a, k: (t == a).float().mean().repeat(k), "the share of all for each class"),
        (lambda t, a, k: (t == a).float().mean(), "gives one number"),
        (
            lambda t, a, k: torch.bincount(t, minlength=k) / torch.bincount(a, minlength=k),
            "how often a class is taken",
        ),
        (sorted_first, "sorts both first"),
        (lambda *x: 1 - by_loop(*x), "the share that is wrong"),
        (
            lambda t, a, k: (
                counted(t, a, k)[0]
                / (
                    torch.bincount(t, minlength=k)
                    + torch.bincount(a, minlength=k)
                    - counted(t, a, k)[0]
                )
            ),
            "divides by those asked for or taken",
        ),
        (
            lambda t, a, k: (
                2
                * counted(t, a, k)[0]
                / (torch.bincount(t, minlength=k) + torch.bincount(a, minlength=k))
            ),
            "divides by the mean of how many",
        ),
        (lambda *x: by_loop(*x).sort().values, "in the wrong places"),
        (lambda *x: by_loop(*x).nan_to_num().sqrt(), "is 0.57735, expected 0.33"),
        (zero_for_none, "nothing is known of it: nan"),
        (lambda t, a, k: by_loop(t, a, int(a.max()) + 1)[: k - 1], "has 3 shares, expected 5"),
        (
            lambda t, a, k: torch.bincount(a[t == a]) / torch.bincount(a, minlength=k),
            "shapes do not fit",
        ),
        (overwrites, "changed a tensor it was given"),
    ],
)
def test_class_accuracy(wrong, message):
    with pytest.raises(Failed, match=message):
        check.class_accuracy(wrong)


@pytest.mark.parametrize("name", ["frechet_distance", "floor", "bootstrap", "class_accuracy"])
def test_the_package_passes_its_own_checks(name):
    function = getattr(evaluation, name)
    assert getattr(check, name)(function) is function
