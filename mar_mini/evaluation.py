"""How good are the samples: so far, whether the class that was asked for can be recognised."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def class_means(
    images: Float[Tensor, "N C H W"], labels: Int[Tensor, " N"]
) -> Float[Tensor, "K C H W"]:
    """The mean image of each class, (K, C, H, W)."""
    return torch.stack([images[labels == k].mean(0) for k in range(int(labels.max()) + 1)])


def nearest_class(
    images: Float[Tensor, "N C H W"], means: Float[Tensor, "K C H W"]
) -> Int[Tensor, " N"]:
    """The class whose mean image is nearest in pixels (Euclidean), (N,) int64."""
    return torch.cdist(images.flatten(1), means.flatten(1)).argmin(1)


def recognised(
    images: Float[Tensor, "N C H W"], asked: Int[Tensor, " N"], means: Float[Tensor, "K C H W"]
) -> float:
    """Share of the images that `nearest_class` takes for the class that was asked for."""
    return float((nearest_class(images, means) == asked.to(images.device)).double().mean())


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
    a, b = a.double(), b.double()
    cov_a, cov_b = (torch.cov(x.T).reshape(x.shape[1], -1) for x in (a, b))
    # the trace of a root is the sum of the roots of the eigenvalues, and those of cov_a cov_b are
    # those of the symmetric root_a cov_b root_a
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    means = (a.mean(0) - b.mean(0)).square().sum()
    return max(0.0, float(means + cov_a.trace() + cov_b.trace() - 2 * cross))
