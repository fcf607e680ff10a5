"""Checks of chapter 6: masks, tokens per step, an order of one's own."""

import math
import operator
import random
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from mar_mini import masking
from mar_mini.checks import Failed, equal, exercise, refuse_mistakes, same_dtype, same_shape


@exercise(reference=masking.mask_by_order)
def mask_by_order(candidate):
    drawn = masking.random(3, 5, 4, torch.Generator().manual_seed(6))
    for order in (drawn, masking.spiral(4, 4, 3)):  # the second: rows that share their memory
        rows, length = order.shape
        for n in (length - 4, 3, 1, length, 0):
            what, given = f"mask_by_order(order, {n})", order.clone()
            mask = _masked(candidate, order, n, what)
            if not torch.equal(order, given):
                raise Failed(f"{what} changed the order it was given; write into a new tensor")
            _refuse_other_masks(mask, order, n, what)
            counts = mask.sum(1).tolist()
            if counts != [n] * rows:
                raise Failed(
                    f"{what} masks {counts} tokens in the {rows} rows, expected {n} in each: the "
                    "columns L - num_masked to L - 1 are that many"
                )
            equal(mask, masking.mask_by_order(order, n), what)


def _masked(candidate, order: Tensor, n: int, what: str) -> Tensor:
    """What the candidate makes of an order, if it is a bool tensor of the right shape."""
    try:
        mask = candidate(order, n)
    except RuntimeError as error:
        if "single memory location" in str(error):
            raise Failed(
                f"{what} writes into the order, whose rows may share one piece of memory; write "
                "into a new tensor"
            ) from error
        raise
    length = order.shape[1]
    if isinstance(mask, Tensor) and mask.shape in {(len(order), n), (len(order), length - n)}:
        if mask.shape != order.shape:
            raise Failed(
                f"{what} has shape {tuple(mask.shape)}, expected {tuple(order.shape)}: a mask has "
                "True or False for every place, it does not list places"
            )
    same_shape(mask, order.shape, what)
    same_dtype(mask, torch.bool, what)
    return mask


def _refuse_other_masks(mask: Tensor, order: Tensor, n: int, what: str) -> None:
    length, want = order.shape[1], masking.mask_by_order(order, n)
    mistakes = {
        "masks everything: a slice that begins at -0 is the whole row": (
            torch.ones_like(want) if n == 0 else want
        ),
        "masks the places of all rows in every row: each row has an order of its own, so index "
        "row by row, as scatter does": want.any(0).expand_as(want),
        "uses the first row's order for all rows": want[:1].expand_as(want),
        "uses the last row's order for all rows": want[-1:].expand_as(want),
        "is upside down: True means masked, still to be predicted": ~want,
        "masks the tokens whose turn comes first; the masked ones are at the order's end": (
            masking.mask_by_order(order.flip(1), n)
        ),
        "masks the last places of the picture; mask those that the order's end names": (
            torch.arange(length).expand_as(order) >= length - n
        ),
        "masks the first places of the picture; mask those that the order's end names": (
            torch.arange(length).expand_as(order) < n
        ),
        "compares entries of the order: they are places, their turn is where they stand": (
            order >= length - n
        ),
        "takes the lowest entries of the order for its last columns: entries are places, their "
        "column is their turn": order < n,
        "answers for the last place first: argsort(descending=True) mirrors the row of places, "
        "argsort() gives each place's turn": want.flip(1),
        "answers for the last place first, and masks the tokens whose turn comes first: take "
        "argsort() without descending, and compare with L - num_masked": (
            masking.mask_by_order(order.flip(1), n).flip(1)
        ),
    }
    refuse_mistakes(mask, want, mistakes, what)


@exercise(reference=masking.tokens_per_step)
def tokens_per_step(candidate):
    # no length * cos(...) of these is a whole number, which rounding could carry to either side
    for length, num_iter in ((256, 64), (64, 16), (64, 64), (17, 3), (16, 1), (100, 99)):
        what = f"tokens_per_step({length}, {num_iter})"
        got = _whole_numbers(candidate(length, num_iter), what)
        want = masking.tokens_per_step(length, num_iter)
        if num_iter > 1:  # one step has too few numbers to tell ideas apart
            refuse_mistakes(got, want, _other_schedules(length, num_iter, want), what)
            if got != want and got in _too_soon(length, num_iter):
                raise Failed(
                    f"{what} reaches 0 one step too soon: the angle of step i is i / N of a "
                    "quarter turn, not i / (N - 1), and N steps need N + 1 numbers masked"
                )
        if len(got) == num_iter - 1 and got == want[:-1]:
            raise Failed(f"{what} leaves out the last step, which takes all that is left")
        if got == [*want[:-1], want[-1] + 1]:
            raise Failed(
                f"{what} predicts {sum(got)} tokens in all, expected {length}: at i = N rounding "
                "makes the cosine a little negative and floor gives -1; set m_N = 0, do not "
                "compute it"
            )
        if len(got) == num_iter and 0 in got:
            raise Failed(
                f"{what} predicts no token in step {got.index(0) + 1}: what is left masked "
                "must fall by at least 1 in each step, and to 0 in the last"
            )
        if len(got) == num_iter and sum(got) != length:
            raise Failed(
                f"{what} predicts {sum(got)} tokens in all, expected {length}: the last step takes "
                "all that is left"
            )
        equal(got, want, what)


def _whole_numbers(got: object, what: str) -> list[int]:
    """The list as Python's int; those of NumPy and torch will do."""
    if not isinstance(got, (list, tuple)):
        advice = "; .tolist() makes one" if hasattr(got, "tolist") else ""
        raise Failed(f"{what} is a {type(got).__name__}, expected a list of int{advice}")
    try:
        return [operator.index(n) for n in got]
    except TypeError as error:
        raise Failed(
            f"{what} has numbers with a point, expected int, as math.floor gives"
            if all(hasattr(n, "__float__") for n in got)
            else f"{what} has entries that are no numbers, expected int"
        ) from error


def _other_schedules(length: int, num_iter: int, want: list[int]) -> dict[str, list[int]]:
    """What plausible mistakes give, by what to say of them."""
    after, many = masking.masked_after(length, num_iter), "the number still masked"
    quarter = math.pi / 2

    def other(share, whole=math.floor) -> list[int]:
        return _schedule(length, num_iter, share, whole)

    def turn(u: float) -> float:
        return math.cos(quarter * u)

    parts = [
        math.floor(length * (turn(i / num_iter) - turn((i + 1) / num_iter)))
        for i in range(num_iter)
    ]
    return {
        f"has {many} after each step, expected how many each step predicts": after,
        f"has {many}, expected how many each step predicts": [length, *after],
        "has the number known after each step, expected how many each step predicts": (
            [length - n for n in after]
        ),
        "has the differences the wrong way round": [-n for n in want],
        "takes many tokens first and few at the end; it is the share still masked that follows "
        "the cosine": want[::-1],
        "lets the share still masked fall like 1 - sine: many tokens first. It follows the "
        "cosine, which falls slowly at first": other(lambda u: 1 - math.sin(quarter * u)),
        "spreads the tokens evenly, expected the cosine schedule": (
            masking.tokens_per_step(length, num_iter, "linear")
        ),
        "squares the cosine, as the noise schedule of chapter 3 does; here it is the cosine "
        "itself": other(lambda u: turn(u) ** 2),
        "takes half a wave, down to cos(pi) = -1; a quarter, down to cos(pi / 2) = 0, is what the "
        "formula says": other(lambda u: math.cos(math.pi * u)),
        "gives the cosine degrees; math.cos takes radians": other(lambda u: math.cos(90 * u)),
        "rounds what is left masked to the nearest; the formula rounds down": other(turn, round),
        "rounds what is left masked up; the formula rounds down": other(turn, math.ceil),
        "rounds each step's tokens by itself, and some get lost; round what is left masked, then "
        "take differences": parts,
        "is one step late: m_1, with i = 1, is what is left after the first step": (
            other(lambda u: turn(u - 1 / num_iter))
        ),
        "is one step early: m_1, with i = 1, is what is left after the first step": (
            other(lambda u: turn(u + 1 / num_iter))
        ),
        "divides by N + 1: after step N nothing is left, so the angle of step i is i / N of a "
        "quarter turn": other(lambda u: turn(u * num_iter / (num_iter + 1))),
        "takes the cosine of what is left, expected of all L tokens: each step would shrink the "
        "last one's rest": _shrinking(length, num_iter),
        "is sorted, but rounding down makes the numbers go up and down: leave them in the order of "
        "the steps": sorted(want),
    }


def _shrinking(length: int, num_iter: int) -> list[int]:
    """m_(i - 1) times the cosine, in place of L times."""
    masked = [length]
    for i in range(1, num_iter):
        left = math.floor(masked[-1] * math.cos(math.pi / 2 * i / num_iter))
        masked.append(min(masked[-1] - 1, left))
    return [before - after for before, after in pairwise([*masked, 0])]


def _too_soon(length: int, num_iter: int) -> Iterator[list[int]]:
    """i / (N - 1) for i / N, however a cosine of 60 or 90 degrees may be rounded."""
    last = num_iter - 1
    for rounding in (1e-9, -1e-9):
        masked = [length]
        for i in range(1, last):
            left = math.floor(length * math.cos(math.pi / 2 * i / last) + rounding)
            masked.append(min(masked[-1] - 1, left))
        for end in ([0, 0], [-1, 0], [0], [-1]):  # N + 1 numbers, or N of them for N - 1 steps
            yield [before - after for before, after in pairwise([*masked, *end])]


def _schedule(length: int, num_iter: int, share, whole) -> list[int]:
    """Tokens per step where `share(i / N)` is still masked, made a whole number by `whole`."""
    masked = [length]
    for i in range(1, num_iter):
        masked.append(min(masked[-1] - 1, whole(length * share(i / num_iter))))
    return [before - after for before, after in pairwise([*masked, 0])]


@exercise(reference=masking.centre_out)
def my_order(candidate):
    """Any order will do that is one, but reading order, forwards or backwards."""
    state = random.getstate()
    try:
        _expect_order(candidate)
    finally:
        random.setstate(state)


def _expect_order(candidate) -> None:
    for height, width in ((4, 4), (8, 8), (3, 5), (7, 3)):  # diagonals of 2 columns are raster
        where = f"for height {height}, width {width}"
        order = _permutations(candidate, height, width, 3, _seeded(1), where)
        forwards = torch.arange(height * width)
        if any(torch.equal(row, way) for row in order for way in (forwards, forwards.flip(0))):
            raise Failed(f"{where}: that is raster order, forwards or backwards; choose another")
        _expect_generator_alone(candidate, height, width, where)
    try:
        candidate(4, 4, 1, None)
    except (AttributeError, TypeError) as error:
        raise Failed(
            "my_order(4, 4, 1, None) does not run: the generator may be None, then draw without"
        ) from error


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _permutations(candidate, height, width, batch_size, generator, where) -> Tensor:
    """What the candidate returns, if it is an order; else say what is wrong and why it may be."""
    result = candidate(height, width, batch_size, generator)
    length, why = height * width, ""
    if not isinstance(result, Tensor):
        why = ", as a tensor: torch.tensor(...) makes one of a list or an array"
    elif result.shape != (batch_size, length):
        if result.shape in {(length,), (1, length)}:
            why = "; one row for each image: order.expand(batch_size, -1)"
        elif result.shape == (length, batch_size):
            why = "; images are rows, turns are columns"
        elif result.shape == (batch_size, height, width):
            why = "; an order is a row of places, flatten the grid"
    elif (result.sort(1).values == torch.arange(length) + 1).all():
        why = "; places are counted from 0"
    elif result.is_floating_point():
        why = "; argsort turns numbers that say how late a place comes into an order"
    elif result.dtype != torch.int64:
        why = "; .long() makes it that"
    try:
        return masking.check_order(result, height, width, batch_size, "what my_order returned")
    except ValueError as error:
        raise Failed(f"{where}: {error}{why}") from error


def _expect_generator_alone(candidate, height: int, width: int, where: str) -> None:
    """Expect that an order depends on its arguments and the generator's state, on nothing else."""
    first, end = _drawn(candidate, height, width, 1, 11, where)
    again, _ = _drawn(candidate, height, width, 1, 11, where)
    elsewhere, _ = _drawn(candidate, height, width, 1, 12, where)
    _, other_end = _drawn(candidate, height, width, 2, 11, where)
    if not torch.equal(first, again):
        raise Failed(
            f"{where}: two calls with generators of the same state give two orders; it must depend "
            "on its arguments alone, so keep nothing between calls and draw from the generator only"
        )
    if not torch.equal(first, elsewhere):
        raise Failed(
            f"{where}: the order depends on Python's random module; draw from the generator that "
            "it is given"
        )
    used = not torch.equal(end, _seeded(1).get_state())
    if used and torch.equal(end, other_end):
        raise Failed(
            f"{where}: my_order sets the seed of the generator that it is given, so every batch "
            "would get the same order; draw from the generator as it comes"
        )
    alone = _permutations(candidate, height, width, 1, _seeded(1), where)
    if not used and not torch.equal(alone[0], first[0]):
        raise Failed(
            f"{where}: the first image has another order in a batch of 1 than in a batch of 3; an "
            "order must not depend on how many images there are"
        )


def _drawn(candidate, height, width, seed: int, around: int, where: str) -> tuple[Tensor, Tensor]:
    """An order and the state in which it leaves its generator; `around` seeds what is global."""
    generator = _seeded(seed)
    torch.manual_seed(around)  # the checkpoint puts torch's state back
    random.seed(around)
    before = torch.get_rng_state()
    order = _permutations(candidate, height, width, 3, generator, where).clone()
    if not torch.equal(before, torch.get_rng_state()):
        used = not torch.equal(generator.get_state(), _seeded(seed).get_state())
        raise Failed(
            f"{where}: my_order draws from torch's global random state, or sets it"
            + (" (and from the generator, too)" if used else "")
            + "; draw from the generator that it is given: generator=generator, each time"
        )
    return order, generator.get_state()
