"""How good are the samples: distances between clouds of features, and what they are worth.

No figure means anything alone. A Fréchet distance of 500 real images to all others is not 0, and
falls with their number: so each figure stands beside its floor, that of as many real images.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor


def class_means(images: Float[Tensor, "N C H W"], labels: Int[Tensor, " N"]) -> Tensor:
    """The mean image of each class, (K, C, H, W)."""
    return torch.stack([images[labels == k].mean(0) for k in range(int(labels.max()) + 1)])


def nearest_class(images: Float[Tensor, "N C H W"], means: Float[Tensor, "K C H W"]) -> Tensor:
    """The class whose mean image is nearest in pixels (Euclidean), (N,) int64."""
    return torch.cdist(images.flatten(1), means.flatten(1)).argmin(1)


def recognised(
    images: Float[Tensor, "N C H W"], asked: Int[Tensor, " N"], means: Float[Tensor, "K C H W"]
) -> float:
    """Share of the images that `nearest_class` takes for the class that was asked for."""
    return float((nearest_class(images, means) == asked.to(images.device)).double().mean())


def class_accuracy(taken: Int[Tensor, " N"], asked: Int[Tensor, " N"], classes: int) -> Tensor:
    """For each class, the share of the images asked for as that class that are taken for it.

    taken    (N,) what a classifier says of each image
    asked    (N,) the class that was asked for, 0 to classes - 1
    returns  (classes,) float64; not a number for a class that nobody asked for
    """
    right = torch.bincount(asked[taken == asked], minlength=classes)
    return right.double() / torch.bincount(asked, minlength=classes)


def frechet_distance(a: Float[Tensor, "N D"], b: Float[Tensor, "M D"]) -> float:
    """Distance of two clouds of features, each taken as a normal distribution (Heusel et al. 2017).

    a, b     (N, D) and (M, D) features, one row an image; computed in float64
    returns  |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)), 0 or more

    Raises ValueError for fewer than two rows, or rows of different length.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(
            f"features are {tuple(a.shape)} and {tuple(b.shape)}; expected (N, D) and (M, D) with "
            "two rows at least"
        )
    return frechet_from_moments(*moments(a), *moments(b))


def moments(features: Float[Tensor, "N D"]) -> tuple[Float64[Tensor, " D"], Float64[Tensor, "D D"]]:
    """Mean and covariance of features, one row an image."""
    x = features.double()
    return x.mean(0), torch.cov(x.T).reshape(x.shape[1], -1)


def frechet_from_moments(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """The Fréchet distance of two normal distributions; float64 means (D,), covariances (D, D)."""
    # the trace of a root is the sum of the roots of the eigenvalues, and those of cov_a cov_b are
    # those of the symmetric root_a cov_b root_a
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    means = (mean_a - mean_b).square().sum()
    return max(0.0, float(means + cov_a.trace() + cov_b.trace() - 2 * cross))


def kernel_distance(
    a: Float[Tensor, "N D"], b: Float[Tensor, "M D"], *, subsets=50, size=1000, generator=None
) -> tuple[float, float]:
    """Squared distance of two clouds of features under the kernel (x.y / D + 1)^3: KID.

    a, b     (N, D), (M, D) features
    subsets  so many times `size` rows of each are compared (all rows if there are fewer)
    returns  mean and standard deviation over the subsets; unbiased, so that the mean of two clouds
             of the same kind is 0, at any number of images

    Source: Binkowski et al. 2018, section 4. Raises ValueError for fewer than two rows.
    """
    size = min(size, len(a), len(b))
    if size < 2:
        raise ValueError(f"{len(a)} and {len(b)} features; expected two at least of each")
    values = []
    for _ in range(subsets):
        x, y = (
            rows[torch.randperm(len(rows), generator=generator)[:size]].double() for rows in (a, b)
        )
        kxx, kyy, kxy = ((p @ q.T / a.shape[1] + 1) ** 3 for p, q in ((x, x), (y, y), (x, y)))
        pairs = size * (size - 1)
        within = (kxx.sum() - kxx.trace() + kyy.sum() - kyy.trace()) / pairs
        values.append(within - 2 * kxy.mean())
    spread = torch.stack(values)
    return float(spread.mean()), float(spread.std(correction=0))


def precision_recall(
    samples: Float[Tensor, "N D"], real: Float[Tensor, "M D"], neighbours: int = 3
) -> tuple[float, float]:
    """How many samples lie among the real images, and how many real images among the samples.

    A point lies among a cloud if it is nearer to one of its points than that point's
    `neighbours`-th neighbour there (Kynkäänniemi et al. 2019, eq. 1-3). Both depend on the number
    of points: compare like with like. Raises ValueError for too few points.
    """
    if min(len(samples), len(real)) <= neighbours:
        raise ValueError(
            f"{len(samples)} samples and {len(real)} real images; expected more than {neighbours}"
        )

    def among(points: Tensor, cloud: Tensor) -> float:
        reach = torch.cdist(cloud, cloud).kthvalue(neighbours + 1, dim=1).values  # (M,)
        return float((torch.cdist(points, cloud) <= reach).any(1).double().mean())

    return among(samples, real), among(real, samples)


def nearest(
    samples: Float[Tensor, "N D"], real: Float[Tensor, "M D"]
) -> tuple[Float[Tensor, " N"], Int[Tensor, " N"]]:
    """Distance to the nearest real image and which it is, for each sample: is it a copy?"""
    distance, index = torch.cdist(samples, real).min(dim=1)
    return distance, index


def linear_discriminant(
    features: Float[Tensor, "N D"], labels: Int[Tensor, " N"]
) -> Callable[[Tensor], Tensor]:
    """A classifier in closed form: the class whose mean is nearest, in units of the spread within.

    features, labels  (N, D), (N,) of real images
    returns           features (M, D) -> classes (M,) int64

    Source: Fisher 1936, with one covariance for all classes.
    """
    x = features.double()
    means = torch.stack([x[labels == k].mean(0) for k in range(int(labels.max()) + 1)])  # (K, D)
    within = x - means[labels]
    root = torch.linalg.cholesky(torch.cov(within.T) + 1e-6 * torch.eye(x.shape[1]))

    def whiten(y: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(root, y.double().T, upper=False).T

    centres = whiten(means)
    return lambda y: torch.cdist(whiten(y), centres).argmin(1)


def psnr(a: Float[Tensor, "N C H W"], b: Float[Tensor, "N C H W"]) -> Float[Tensor, " N"]:
    """Peak signal-to-noise ratio of each image in decibels; images in [0, 1]."""
    return -10 * (a - b).square().flatten(1).mean(1).clamp(min=1e-12).log10()


def bootstrap(
    measure: Callable[[Tensor], float], n: int, *, rounds=100, level=0.95, generator=None
) -> tuple[float, float]:
    """An interval for a measure of n rows: from what it gives for rows drawn with replacement.

    measure  indices (n,) -> number

    Source: Efron 1979. A Fréchet distance is larger for fewer different rows, and resampled rows
    repeat: its interval then lies above its value, and only its width is to be used.
    """
    values = torch.tensor(
        [measure(torch.randint(n, (n,), generator=generator)) for _ in range(rounds)],
        dtype=torch.float64,
    )
    low, high = values.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2]).double())
    return float(low), float(high)


def floor(
    real: Float[Tensor, "P D"], n: int, m: int, *, distance=frechet_distance, generator=None
) -> float:
    """What a distance of n images to m images comes to if all are real: two sets without overlap.

    real      (P, D) features of real images, in any order; n + m of them are drawn
    distance  (n, D), (m, D) -> number

    Raises ValueError for fewer than n + m rows.
    """
    if len(real) < n + m:
        raise ValueError(f"{len(real)} real images; expected {n} + {m} at least, all different")
    order = torch.randperm(len(real), generator=generator)
    return distance(real[order[:n]], real[order[n : n + m]])
