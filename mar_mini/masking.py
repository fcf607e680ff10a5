"""Which tokens are hidden, in what order they are generated, and how many at a time.

An `order` is int64 (B, L), each row a permutation of the raster positions, **first to last**:
`order[:, 0]` is generated first. A `mask` is bool (B, L), True = still to be predicted.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mar_mini.configs import choose
from mar_mini.tokens import take

Order = Callable[[int, int, int, torch.Generator | None], Tensor]


def random(height, width, batch_size, generator=None) -> Int[Tensor, "B L"]:
    """A different random permutation for each image (MAR section 3.4)."""
    device = "cpu" if generator is None else generator.device
    return torch.rand(batch_size, height * width, generator=generator, device=device).argsort(dim=1)


def raster(height, width, batch_size, generator=None) -> Int[Tensor, "B L"]:
    """Left to right, top to bottom, as one reads."""
    return torch.arange(height * width).expand(batch_size, -1)


def reversed_raster(height, width, batch_size, generator=None) -> Int[Tensor, "B L"]:
    """Raster backwards: from the lower right corner to the upper left one."""
    return raster(height, width, batch_size).flip(1)


def spiral(height, width, batch_size, generator=None) -> Int[Tensor, "B L"]:
    """Clockwise from the upper left corner inwards."""
    grid = torch.arange(height * width).reshape(height, width)
    turns = []
    while grid.numel():
        turns.append(grid[0])
        grid = grid[1:].T.flip(0)  # what is left, turned so that the next side lies on top
    return torch.cat(turns).expand(batch_size, -1)


def centre_out(height, width, batch_size, generator=None) -> Int[Tensor, "B L"]:
    """By distance from the centre, nearest first; ties in raster order."""
    y = torch.arange(height)[:, None] - (height - 1) / 2
    x = torch.arange(width)[None, :] - (width - 1) / 2
    return (y**2 + x**2).flatten().argsort(stable=True).expand(batch_size, -1)


def checkerboard(height, width, batch_size, generator=None) -> Int[Tensor, "B L"]:
    """All fields of one colour in random order, then those of the other."""
    y, x = torch.arange(height)[:, None], torch.arange(width)[None, :]
    colour = ((y + x) % 2).flatten()
    shuffled = random(height, width, batch_size, generator)
    return shuffled.gather(1, colour.to(shuffled.device)[shuffled].argsort(dim=1, stable=True))


def halton(height, width, batch_size, generator=None) -> Int[Tensor, "B L"]:
    """Evenly spread at every moment: as a Halton sequence of bases 2 and 3 visits the cells.

    Source: Halton 1960; as an order for masked image models Besnier et al. 2025.
    """
    seen: dict[int, None] = {}
    i = 0
    while len(seen) < height * width:
        i += 1
        row = math.floor(height * radical_inverse(i, 2))
        column = math.floor(width * radical_inverse(i, 3))
        seen.setdefault(row * width + column)
    return torch.tensor(list(seen)).expand(batch_size, -1)


def radical_inverse(i: int, base: int) -> Fraction:
    """The digits of i in a base, mirrored at the point: 6 is 110 in base 2, and gives 0.011."""
    value, scale = 0, 1
    while i:
        i, digit = divmod(i, base)
        value, scale = value * base + digit, scale * base
    return Fraction(value, scale)


FUNCTIONS = (random, raster, reversed_raster, spiral, centre_out, checkerboard, halton)
ORDERS: dict[str, Order] = {order.__name__: order for order in FUNCTIONS}


def make_order(
    order: str | Order, height: int, width: int, batch_size: int, generator=None
) -> Int[Tensor, "B L"]:
    """Make an order by its name in `ORDERS` or by a function like those, and check it."""
    function = choose("order", order, ORDERS)
    result = function(height, width, batch_size, generator)
    name = getattr(function, "__name__", "the order function")
    return check_order(result, height, width, batch_size, f"what {name} returned")


def check_order(result, height, width, batch_size, name="the order") -> Int[Tensor, "B L"]:
    """Return that order, if it is one; else raise ValueError that says what came instead."""
    length = height * width
    if not isinstance(result, Tensor) or result.dtype != torch.int64:
        got = result.dtype if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(f"{name} is {got}; expected int64 ({batch_size}, {length})")
    if result.shape != (batch_size, length):
        got, want = tuple(result.shape), (batch_size, length)
        raise ValueError(f"{name} has shape {got}; expected {want}, one row an image")
    expected = torch.arange(length, device=result.device)
    wrong = (result.sort(1).values != expected).any(1).nonzero().flatten()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"row {row} of {name} is not a permutation of 0 to {length - 1}; each place of the "
            f"{height}x{width} grid must come exactly once"
        )
    return result


def mask_by_order(order: Int[Tensor, "B L"], num_masked: int) -> Bool[Tensor, "B L"]:
    """Mask the `num_masked` tokens of each row whose turn comes last."""
    if not 0 <= num_masked <= order.shape[1]:
        raise ValueError(f"num_masked is {num_masked}; expected 0 to {order.shape[1]}")
    mask = torch.zeros_like(order, dtype=torch.bool)
    return mask.scatter_(1, order[:, order.shape[1] - num_masked :], True)


def known_first(order: Int[Tensor, "B L"], known: Bool[Tensor, "B L"]) -> Int[Tensor, "B L"]:
    """Move known places (True by place, not by turn) to the front; each kind keeps its order."""
    unknown = ~known.gather(1, order)  # (B, L) by turn
    return order.gather(1, unknown.int().argsort(dim=1, stable=True))  # (B, L)


def same_count(chosen: Bool[Tensor, "B L"], name: str = "the mask") -> int:
    """Count the places that each row chooses; raise ValueError if not all choose as many."""
    first, *others = chosen.sum(1).tolist()
    for row, count in enumerate(others, start=1):
        if count != first:
            raise ValueError(
                f"row 0 of {name} has {first} chosen tokens, row {row} has {count}; "
                "expected the same number in each row of a batch, so split it"
            )
    return first


def positions(chosen: Bool[Tensor, "B L"], count: int | None = None) -> Int[Tensor, "B K"]:
    """Positions of the chosen tokens of each row, ascending; `count` of them, counted if None."""
    count = same_count(chosen) if count is None else count
    return chosen.int().argsort(dim=1, descending=True, stable=True)[:, :count]


def keep(x: Float[Tensor, "B L D"], chosen: Tensor, count=None) -> Float[Tensor, "B K D"]:
    """Take the chosen tokens of each row, in the order of their places; see `positions`."""
    return take(x, positions(chosen, count))


def restore(
    x: Float[Tensor, "B K D"], mask: Bool[Tensor, "B L"], mask_token: Float[Tensor, "1 1 D"]
) -> Float[Tensor, "B L D"]:
    """Put the known tokens x, by ascending places, back; the mask token fills all others."""
    known = positions(~mask, x.shape[1])[..., None]  # (B, K, 1)
    full = mask_token.to(x.dtype).repeat(*mask.shape, 1)  # (B, L, D)
    return full.scatter(1, known.expand_as(x), x)  # (B, L, D)


def sample_mask_ratio(mask_ratio_min: float, generator=None, std: float = 0.25) -> float:
    """Draw the share of tokens to hide: normal, cut off outside [minimum, 1] (MAR section 4)."""
    normal = torch.distributions.Normal(0.0, 1.0)
    lowest = normal.cdf(torch.tensor((mask_ratio_min - 1.0) / std, dtype=torch.float64))
    device = "cpu" if generator is None else generator.device
    u = torch.rand((), generator=generator, dtype=torch.float64, device=device).cpu()
    ratio = 1.0 + std * normal.icdf(lowest + u * (0.5 - lowest))
    return min(1.0, max(mask_ratio_min, float(ratio)))


def mean_mask_ratio(mask_ratio_min: float, std: float = 0.25) -> float:
    """Mean of `sample_mask_ratio`: 0.867 for 0.7."""
    if mask_ratio_min == 1:
        return 1.0
    lowest = (mask_ratio_min - 1) / std
    density = (1 - math.exp(-(lowest**2) / 2)) / math.sqrt(2 * math.pi)
    return 1 - std * density / (-math.erf(lowest / math.sqrt(2)) / 2)


Schedule = Callable[[int, int], float | Fraction]  # (i, N) -> share masked after step i of N

SCHEDULES: dict[str, Schedule] = {
    "cosine": lambda i, n: math.cos(math.pi / 2 * i / n),
    "linear": lambda i, n: Fraction(n - i, n),
}


def masked_after(length: int, num_iter: int, schedule: str | Schedule = "cosine") -> list[int]:
    """Count the tokens that are still masked after each of `num_iter` steps, 1 to `length`.

    schedule  "cosine" (few tokens at first, many at the end; MAR section 3.4, after MaskGIT),
              "linear", or a function (i, N) -> share still masked after step i of N
    """
    if not isinstance(num_iter, int) or not 1 <= num_iter <= length:
        why = "since each step predicts a token"
        raise ValueError(f"num_iter is {num_iter}; expected 1 to {length}, {why}")
    share = choose("schedule", schedule, SCHEDULES)
    masked = [length]
    for i in range(1, num_iter):
        left = math.floor(length * share(i, num_iter))
        masked.append(max(num_iter - i, min(masked[-1] - 1, left)))
    return [*masked[1:], 0]


def tokens_per_step(length: int, num_iter: int, schedule: str | Schedule = "cosine") -> list[int]:
    """Count the tokens that each step predicts, at least 1; arguments as for `masked_after`."""
    masked = [length, *masked_after(length, num_iter, schedule)]
    return [before - after for before, after in pairwise(masked)]
