"""Dropout that draws one random number of 64 bits for four values.

On a CPU the library draws one for each value, one after the other: a third of a training step.
"""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn


def drop(x: Tensor, p: float) -> Tensor:
    """Set a share p of the values to zero and scale up the rest (Srivastava et al. 2014).

    x        any shape, float
    returns  the same shape; on a CPU p is rounded to a multiple of 1/65536
    """
    dropped = round(p * 2**16)  # of 65536 equal cases
    if x.device.type != "cpu" or not 0 < dropped < 2**16:
        return F.dropout(x, p)
    cases = (compiled_cases if torch.compiler.is_compiling() else random_cases)(x)
    keep = (cases >= dropped - 2**15).view(torch.uint8).to(x.dtype)  # faster than from bool
    return x * keep.mul_(2**16 / (2**16 - dropped))


def random_cases(like: Tensor) -> Int[Tensor, "*B"]:
    """Random int16 of that shape, all 65536 cases equally likely; torch's generator is the seed."""
    seed = int(torch.randint(2**62, ()))
    bits = np.random.SFC64(seed).random_raw(-(-like.numel() // 4))  # 64 of them each
    return torch.from_numpy(bits.view(np.int16))[: like.numel()].view(like.shape)


# `torch.compile` cannot look into it, and must not draw anew in the backward pass
compiled_cases = torch.library.custom_op(
    "mar_mini::random_cases",
    lambda like: random_cases(like),
    mutates_args=(),
    schema="(Tensor like) -> Tensor",
    tags=[torch.Tag.nondeterministic_seeded],
)
compiled_cases.register_fake(lambda like: torch.empty(like.shape, dtype=torch.int16))


class FastDropout(nn.Dropout):
    """Dropout by `drop` in training, nothing else."""

    def forward(self, x: Tensor) -> Tensor:
        return drop(x, self.p) if self.training else x
