"""Checks of chapter 6: masks, tokens per step, an order of one's own."""

import math
from itertools import pairwise

import torch

from mar_mini import masking
from mar_mini.checks import Failed, equal, exercise, refuse_mistakes, same_dtype, same_shape


@exercise(reference=masking.mask_by_order)
def mask_by_order(candidate):
    order = masking.random(4, 4, 5, torch.Generator().manual_seed(6))
    for n in (12, 3, 1, 16, 0):
        what, given = f"mask_by_order(order, {n})", order.clone()
        mask = candidate(given, n)
        same_shape(mask, order.shape, what)
        same_dtype(mask, torch.bool, what)
        if not torch.equal(order, given):
            raise Failed(f"{what} changed the order it was given; write into a new tensor")
        want = masking.mask_by_order(order, n)
        mistakes = {
            "masks everything: a slice that begins at -0 is the whole row": (
                torch.ones_like(want) if n == 0 else want
            ),
            "masks the places of all rows in every row: each row has an order of its own, so index "
            "row by row, as scatter does": want.any(0).expand_as(want),
            "uses the first row's order for all rows": want[:1].expand_as(want),
            "is upside down: True means masked, still to be predicted": ~want,
            "masks the tokens whose turn comes first; the masked ones are at the order's end": (
                masking.mask_by_order(order.flip(1), n)
            ),
            "masks the last places of the picture; mask those that the order's end names": (
                torch.arange(16).expand(5, -1) >= 16 - n
            ),
            "compares entries of the order: they are places, their turn is where they stand": (
                order >= 16 - n
            ),
        }
        refuse_mistakes(mask, want, mistakes, what)
        counts = mask.sum(1).tolist()
        if counts != [n] * 5:
            raise Failed(f"{what} masks {counts} tokens in the five rows, expected {n} in each")
        equal(mask, want, what)


@exercise(reference=masking.tokens_per_step)
def tokens_per_step(candidate):
    for length, num_iter in ((256, 64), (64, 16), (64, 64), (16, 3), (16, 1), (100, 99)):
        what, got = f"tokens_per_step({length}, {num_iter})", candidate(length, num_iter)
        if not isinstance(got, (list, tuple)):
            raise Failed(f"{what} is a {type(got).__name__}, expected a list of int")
        want = masking.tokens_per_step(length, num_iter)
        after, many = masking.masked_after(length, num_iter), "the number still masked"
        mistakes = {
            f"has {many} after each step, expected how many each step predicts": after,
            f"has {many}, expected how many each step predicts": [length, *after],
            "has the differences the wrong way round": [-n for n in want],
            "takes many tokens first and few at the end; it is the share still masked that follows "
            "the cosine": want[::-1],
            "spreads the tokens evenly, expected the cosine schedule": (
                masking.tokens_per_step(length, num_iter, "linear")
            ),
            "rounds what is left masked to the nearest; the formula rounds down": (
                _cosine(length, num_iter, round)
            ),
            "rounds what is left masked up; the formula rounds down": (
                _cosine(length, num_iter, math.ceil)
            ),
            "is one step late: m_1, with i = 1, is what is left after the first step": (
                _cosine(length, num_iter, math.floor, late=1)
            ),
        }
        refuse_mistakes(list(got), want, mistakes, what)
        if len(got) == num_iter and 0 in got:
            raise Failed(
                f"{what} predicts no token in step {list(got).index(0) + 1}: what is left masked "
                "must fall by at least 1 in each step"
            )
        if len(got) == num_iter and sum(got) != length:
            raise Failed(
                f"{what} predicts {sum(got)} tokens in all, expected {length}: the last step takes "
                "all that is left"
            )
        equal(got, want, what)


def _cosine(length: int, num_iter: int, whole, late: int = 0) -> list[int]:
    """The schedule with another way to make whole numbers, or some steps late."""
    masked = [length]
    for i in range(1, num_iter):
        left = whole(length * math.cos(math.pi / 2 * (i - late) / num_iter))
        masked.append(min(masked[-1] - 1, left))
    return [before - after for before, after in pairwise([*masked, 0])]


@exercise(reference=masking.centre_out)
def my_order(candidate):
    """Any order will do that is one, but reading order, forwards or backwards."""
    for height, width in ((4, 4), (8, 8), (3, 5)):
        seeded = torch.Generator().manual_seed(1)
        try:
            order = masking.make_order(candidate, height, width, 3, seeded)
        except ValueError as error:
            raise Failed(f"for height {height}, width {width}: {error}") from error
    for backwards in (False, True):
        if torch.equal(order[0], order[0].sort(descending=backwards).values):
            raise Failed("that is raster order, forwards or backwards; choose another")
