"""What a step of a training sees: which images, from where, with which random numbers."""

from functools import lru_cache
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

BLOCK = 32


@runtime_checkable
class Images(Protocol):
    """Images as a training asks for them; `InMemory` is the simplest kind.

    labels  (N,) int64, the index of each image's class
    """

    labels: Tensor

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor, flip: Tensor, generator: torch.Generator) -> Tensor:
        """What `MAR.patchify` takes, (n, C, H, W) float32, of some images.

        indices    (n,) int64
        flip       (n,) bool, True = mirrored
        generator  on the CPU, for what is random in them (a draw from the posterior)
        """


class InMemory:
    """Images that are tensors, on any device.

    latents   (N, C, H, W) float, as `MAR.patchify` takes them
    labels    (N,) int64
    mirrored  the same of the mirrored images; without them the last axis is reversed, which is
              right for pixels only

    Raises ValueError if these do not belong together.
    """

    def __init__(
        self,
        latents: Float[Tensor, "N C H W"],
        labels: Int[Tensor, " M"],
        mirrored: Float[Tensor, "M2 C H W"] | None = None,
    ):
        if len(latents) != len(labels):
            raise ValueError(
                f"{len(latents)} images but {len(labels)} labels; expected one for each"
            )
        if mirrored is not None and mirrored.shape != latents.shape:
            raise ValueError(
                f"mirrored is {tuple(mirrored.shape)}; expected {tuple(latents.shape)} as the "
                "latents"
            )
        self.latents, self.labels, self.mirrored = latents, labels, mirrored

    def __len__(self) -> int:
        return len(self.latents)

    def batch(self, indices, flip, generator=None) -> Float[Tensor, "B C H W"]:
        """See `Images`; nothing in them is random."""
        indices, flip = indices.to(self.latents.device), flip.to(self.latents.device)
        straight = self.latents[indices]
        if not flip.any():
            return straight
        mirrored = straight.flip(-1) if self.mirrored is None else self.mirrored[indices]
        return torch.where(flip[:, None, None, None], mirrored, straight)


def fetch(
    images: Images,
    picked: Int[Tensor, " B"],
    flip: Bool[Tensor, " B"],
    rows: slice,
    seed: int,
) -> Float[Tensor, "R C H W"]:
    """Some rows of a batch, the same whoever asks for which rows.

    picked, flip  of the whole batch
    seed          of the whole batch

    They come in blocks of 32 rows, each with random numbers of its own, so that a process that
    needs a part of the batch need not read all of it. Autocast, which is for the model's products,
    is off: what is stored in float16 could not be put together under it.
    """
    first = rows.start - rows.start % BLOCK
    parts = []
    with torch.autocast("cpu", enabled=False):
        for start in range(first, rows.stop, BLOCK):
            block = slice(start, min(start + BLOCK, len(picked)))
            parts.append(images.batch(picked[block], flip[block], step_generator(seed, start)))
    return torch.cat(parts)[rows.start - first : rows.stop - first]


def step_seed(seed: int, step: int) -> int:
    """One number from two, such that neighbours share nothing."""
    return int(np.random.SeedSequence((seed, step)).generate_state(1)[0])


def step_generator(seed: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The random numbers of one step: a function of (seed, step) and nothing else."""
    return torch.Generator(device).manual_seed(step_seed(seed, step))


@lru_cache(maxsize=2)
def shuffled(seed: int, epoch: int, num_images: int) -> Int[Tensor, " N"]:
    generator = step_generator(seed, 2**32 + epoch)  # apart from those of the steps
    return torch.randperm(num_images, generator=generator)


def batch_indices(seed: int, step: int, num_images: int, batch_size: int) -> Int[Tensor, " B"]:
    """Which images step `step` (from 0) sees: epoch after epoch, each image once in each."""
    first = step * batch_size
    picked = []
    while len(picked) < batch_size:
        epoch, offset = divmod(first + len(picked), num_images)
        rest = batch_size - len(picked)
        picked.extend(shuffled(seed, epoch, num_images)[offset : offset + rest].tolist())
    return torch.tensor(picked)


def flip_half(
    images: Tensor, mirrored: Tensor, picked: Int[Tensor, " B"], generator: torch.Generator
) -> Tensor:
    """Those images, each mirrored with probability 1/2."""
    coin = coins(len(picked), generator).to(images.device)
    return torch.where(coin[:, None, None, None], mirrored[picked], images[picked])


def coins(n: int, generator: torch.Generator) -> Bool[Tensor, " n"]:
    """True with probability 1/2."""
    return torch.rand(n, generator=generator, device=generator.device) < 0.5
