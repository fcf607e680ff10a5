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
