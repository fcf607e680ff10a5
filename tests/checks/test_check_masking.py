"""The checks of chapter 6 refuse plausible mistakes, each by the name of its idea."""

import math
import random

import numpy as np
import pytest
import torch

from mar_mini import masking
from mar_mini.checks import Failed
from mar_mini.checks import masking as check


@pytest.fixture(autouse=True)
def strict(monkeypatch):
    monkeypatch.setenv("MAR_MINI_STRICT", "1")


def scatter(order, columns):
    return torch.zeros_like(order, dtype=torch.bool).scatter(1, columns, True)


def upside_down(order, num_masked):
    return scatter(order, order[:, : order.shape[1] - num_masked])


def first_not_last(order, num_masked):
    return scatter(order, order[:, :num_masked])


def last_places(order, num_masked):
    mask = torch.zeros_like(order, dtype=torch.bool)
    mask[:, order.shape[1] - num_masked :] = True
    return mask


def places_for_turns(order, num_masked):
    return order >= order.shape[1] - num_masked


def all_rows(order, num_masked):
    mask = torch.zeros_like(order, dtype=torch.bool)
    mask[:, order[:, order.shape[1] - num_masked :].flatten()] = True
    return mask


def first_row(order, num_masked):
    return masking.mask_by_order(order[:1].expand_as(order).contiguous(), num_masked)


def minus_zero(order, num_masked):
    return scatter(order, order[:, -num_masked:])  # -0 is the beginning


def one_too_few(order, num_masked):
    return scatter(order, order[:, order.shape[1] - num_masked + 1 :])


def whole_numbers(order, num_masked):
    return masking.mask_by_order(order, num_masked).long()


def turns_for_places(order, num_masked):
    return masking.mask_by_order(order.argsort(1), num_masked)


def first_places(order, num_masked):
    return torch.arange(order.shape[1]).expand_as(order) < num_masked


def into_the_order(order, num_masked):
    order[:, : order.shape[1] - num_masked] = 0
    return order > 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (upside_down, "upside down"),
        (first_not_last, "whose turn comes first"),
        (last_places, "last places of the picture"),
        (first_places, "first places of the picture"),
        (places_for_turns, "they are places"),
        (turns_for_places, "they are places, their turn"),
        (all_rows, "places of all rows in every row"),
        (first_row, "first row's order"),
        (lambda o, n: first_row(o.flip(0), n), "last row's order"),
        (minus_zero, r"\(order, 0\) masks everything: a slice"),
        (one_too_few, r"masks \[10, 10, 10, 10\] tokens .* expected 11 in each: the columns"),
        (lambda o, n: scatter(o, o[:, o.shape[1] - n - 1 :]), r"\[12, 12, 12, 12\] tokens"),
        (lambda o, n: o[:, o.shape[1] - n :], r"\(4, 11\), expected \(4, 15\): a mask has True"),
        (lambda o, n: masking.mask_by_order(o, n)[0], r"has shape \(15,\), expected \(4, 15\)"),
        (lambda o, n: masking.mask_by_order(o, n).float(), "dtype torch.float32, expected"),
        (lambda o, n: masking.mask_by_order(o, n).tolist(), "of type list, expected a tensor"),
        (lambda o, n: masking.mask_by_order(o, n).roll(1, 1), r"\[0, 0\] is"),
        (whole_numbers, "dtype torch.int64, expected torch.bool"),
        (into_the_order, "changed the order it was given"),
        (lambda o, n: o < n, "takes the lowest entries of the order"),
        (lambda o, n: o.argsort(1, True) >= o.shape[1] - n, "last place first: argsort"),
        (lambda o, n: o.argsort(1, True) < n, "last place first, and masks the tokens"),
    ],
)
def test_mask_by_order(wrong, message):
    with pytest.raises(Failed, match=message):
        check.mask_by_order(wrong)


def test_mask_by_order_must_leave_the_order_alone():
    def in_place(order, num_masked):
        mask = masking.mask_by_order(order, num_masked)
        order.zero_()
        return mask

    with pytest.raises(Failed, match="changed the order"):
        check.mask_by_order(in_place)


def quarter_wave(u):
    return math.cos(math.pi / 2 * u)


def cosine(length, num_iter, whole=math.floor, guard=True, share=quarter_wave):
    masked = [length]
    for i in range(1, num_iter):
        left = whole(length * share(i / num_iter))
        masked.append(max(1, min(masked[-1] - 1, left)) if guard else left)
    masked.append(0)
    return [a - b for a, b in zip(masked, masked[1:], strict=False)]


def free(length, num_iter, share):
    """As the formula, with the minimum alone."""
    masked = [length]
    for i in range(1, num_iter):
        masked.append(min(masked[-1] - 1, math.floor(length * share(i / num_iter))))
    return [a - b for a, b in zip(masked, [*masked[1:], 0], strict=True)]


def in_numbers(length, num_iter, share, masked_last=(0,)):
    """As the formula, with the share from i, for N numbers or one more."""
    masked = [length]
    for i in range(1, num_iter):
        masked.append(min(masked[-1] - 1, math.floor(length * share(i))))
    masked += masked_last
    return [a - b for a, b in zip(masked, masked[1:], strict=False)]


def too_soon(length, num_iter, **more):
    quarter = math.pi / 2
    return in_numbers(length, num_iter, lambda i: math.cos(quarter * i / (num_iter - 1)), **more)


def too_soon_and_below(length, num_iter):
    angle = math.pi / 2 / (num_iter - 1) + 1e-15  # rounding, on some machine
    return in_numbers(length, num_iter, lambda i: math.cos(angle * i))


def end_computed(length, num_iter):
    masked = [length]
    for i in range(1, num_iter + 1):
        left = math.floor(length * math.cos(math.pi / 2 * i / num_iter))
        masked.append(min(masked[-1] - 1, left))
    return [a - b for a, b in zip(masked, masked[1:], strict=False)]


def shrinking(length, num_iter):
    masked = [length]
    for i in range(1, num_iter):
        masked.append(min(masked[-1] - 1, math.floor(masked[-1] * quarter_wave(i / num_iter))))
    return [a - b for a, b in zip(masked, [*masked[1:], 0], strict=True)]


def nothing_in_one_step(length, num_iter):
    return [0] if num_iter == 1 else cosine(length, num_iter)


def each_rounded(length, num_iter):
    shares = [quarter_wave(i / num_iter) for i in range(num_iter + 1)]
    return [math.floor(length * (a - b)) for a, b in zip(shares, shares[1:], strict=False)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (each_rounded, "rounds each step's tokens by itself"),
        (lambda n, k: free(n, k, lambda u: quarter_wave(u) ** 2), "squares the cosine"),
        (lambda n, k: free(n, k, lambda u: math.cos(math.pi * u)), "takes half a wave"),
        (lambda n, k: free(n, k, lambda u: math.cos(90 * u)), "cosine degrees"),
        (lambda n, k: free(n, k, lambda u: 1 - math.sin(math.pi / 2 * u)), "like 1 - sine"),
        (lambda n, k: free(n, k, lambda u: quarter_wave(u + 1 / k)), "one step early"),
        (lambda n, k: free(n, k, lambda u: quarter_wave(u * k / max(1, k - 1))), "one step too s"),
        (lambda n, k: [n - m for m in masking.masked_after(n, k)], "number known after each step"),
        (lambda n, k: cosine(n, k)[:-1], "leaves out the last step"),
        (lambda n, k: [float(x) for x in cosine(n, k)], "numbers with a point, expected int"),
        (lambda n, k: sum(cosine(n, k)), "is a int, expected a list of int"),
        (lambda n, k: cosine(n, k, whole=round), "rounds down"),  # off by less than 10%
        (lambda n, k: cosine(n, k)[::-1], "many tokens first"),
        (lambda n, k: cosine(n, k, share=lambda u: 1 - u), "spreads the tokens evenly"),
        (lambda n, k: cosine(n, k, guard=False), "predicts no token in step 2"),
        (lambda n, k: masking.masked_after(n, k), "still masked after each step"),
        (lambda n, k: [n, *masking.masked_after(n, k)], "the number still masked"),
        (lambda n, k: [-x for x in cosine(n, k)], "wrong way round"),
        (lambda n, k: cosine(n, k, share=lambda u: quarter_wave(u - 1 / k)), "one step late"),
        (lambda n, k: cosine(n, k)[:-1] + [1], "255 tokens in all|tokens in all, expected 256"),
        (lambda n, k: cosine(n, k, whole=math.ceil), "rounds what is left masked up"),
        (lambda n, k: torch.tensor(cosine(n, k)), r"is a Tensor, expected a list of int; \.tolist"),
        (lambda n, k: np.array(cosine(n, k)), r"is a ndarray, expected a list of int; \.tolist"),
        (lambda n, k: list(torch.tensor(cosine(n, k)).double()), "numbers with a point"),
        (lambda n, k: [str(x) for x in cosine(n, k)], "entries that are no numbers"),
        (too_soon, "one step too soon"),
        (too_soon_and_below, "one step too soon"),
        (lambda n, k: too_soon(n, k, masked_last=()), "one step too soon"),
        (lambda n, k: free(n, k, lambda u: quarter_wave(u * k / (k + 1))), r"divides by N \+ 1"),
        (shrinking, "takes the cosine of what is left"),
        (lambda n, k: sorted(cosine(n, k)), "is sorted, but rounding"),
        (nothing_in_one_step, r"\(16, 1\) predicts no token in step 1"),
        (end_computed, r"\(100, 99\) predicts 101 tokens .* set m_N = 0, do not compute it"),
    ],
)
def test_tokens_per_step(wrong, message):
    with pytest.raises(Failed, match=message):
        check.tokens_per_step(wrong)


def by_torch(length, num_iter, dtype=torch.float64):
    angles = torch.linspace(0, math.pi / 2, num_iter + 1, dtype=dtype)[:-1]
    masked = [length]
    for angle in angles[1:]:
        masked.append(min(masked[-1] - 1, math.floor(length * torch.cos(angle))))
    return [a - b for a, b in zip(masked, [*masked[1:], 0], strict=True)]


def by_numpy(length, num_iter):
    masked = [length]
    for i in range(1, num_iter):
        left = np.floor(length * np.cos(np.pi * i / 2 / num_iter))
        masked.append(int(min(masked[-1] - 1, left)))
    return list(-np.diff([*masked, 0]))


def by_tensors(length, num_iter):
    return list(torch.tensor(cosine(length, num_iter)))


@pytest.mark.parametrize(
    "right",
    [
        by_torch,
        lambda n, k: by_torch(n, k, torch.float32),
        by_numpy,
        by_tensors,
        lambda n, k: in_numbers(n, k, lambda i: math.sin(math.pi / 2 * (k - i) / k)),
    ],
)
def test_other_ways_to_calculate_the_cosine_pass(right):
    assert check.tokens_per_step(right) is right


def one_row(height, width, batch_size, generator=None):
    return masking.spiral(height, width, 1)


def square_only(height, width, batch_size, generator=None):
    return torch.arange(height**2).roll(3).expand(batch_size, -1)


def with_repeats(height, width, batch_size, generator=None):
    return torch.randint(height * width, (batch_size, height * width))


def by_score(score):
    """An order from a function of batch size, places and generator that says how late each is."""

    def order(height, width, batch_size, generator=None):
        return score(batch_size, height * width, generator).argsort(1)

    return order


def python_random(height, width, batch_size, generator=None):
    return torch.tensor([random.sample(range(height * width), height * width)] * batch_size)


def seeds_the_generator(height, width, batch_size, generator=None):
    return masking.random(height, width, batch_size, generator.manual_seed(3))


def seeds_torch(height, width, batch_size, generator=None):
    torch.manual_seed(0)
    return torch.randperm(height * width).expand(batch_size, -1)


def from_both(height, width, batch_size, generator=None):
    order = masking.random(height, width, batch_size, generator)
    return order[:, torch.randperm(height * width)]


def by_batch_size(height, width, batch_size, generator=None):
    return masking.spiral(height, width, batch_size).roll(batch_size, 1)


def raster_unless_square(height, width, batch_size, generator=None):
    return (masking.spiral if height == width else masking.raster)(height, width, batch_size)


def first_row_raster(height, width, batch_size, generator=None):
    order = masking.spiral(height, width, batch_size).clone()
    order[0] = torch.arange(height * width)
    return order


def first_row_raster_last_reversed(height, width, batch_size, generator=None):
    order = masking.reversed_raster(height, width, batch_size).clone()
    order[0] = torch.arange(height * width)
    return order


def counting():
    calls = []

    def order(height, width, batch_size, generator=None):
        calls.append(None)
        return masking.spiral(height, width, batch_size).roll(len(calls), 1)

    return order


def needs_a_generator(height, width, batch_size, generator=None):
    device = generator.device
    return masking.random(height, width, batch_size, generator).to(device)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (one_row, r"has shape \(1, 16\); expected \(3, 16\)"),
        (lambda h, w, b, g: masking.spiral(h, w, 1)[0], r"one row for each image: order\.expand"),
        (lambda h, w, b, g: masking.spiral(h, w, b).T, "images are rows, turns are columns"),
        (lambda h, w, b, g: masking.spiral(h, w, b).unflatten(1, (h, w)), "flatten the grid"),
        (lambda h, w, b, g: masking.spiral(h, w, b) + 1, "places are counted from 0"),
        (lambda h, w, b, g: masking.spiral(h, w, b) / (h * w), "argsort turns numbers"),
        (lambda h, w, b, g: masking.spiral(h, w, b).int(), "int32; expected int64"),
        (lambda h, w, b, g: masking.spiral(h, w, b).tolist(), "is list; expected int64"),
        (lambda h, w, b, g: masking.spiral(h, w, b)[:, :-1], r"shape \(3, 15\); expected"),
        (square_only, "for height 3, width 5: what my_order returned has shape"),
        (with_repeats, "not a permutation"),
        (lambda h, w, b, g: masking.spiral(h, w, b).numpy(), "is ndarray; .*, as a tensor: torch"),
        (lambda h, w, b, g: masking.spiral(h, w, b).int(), r"int32; .*; \.long\(\) makes it that"),
        (lambda h, w, b, g: masking.spiral(h, w, 1), r"\(1, 16\); .*order\.expand\(batch_size"),
        (raster_unless_square, "for height 3, width 5: that is raster order"),
        (first_row_raster, "for height 4, width 4: that is raster order"),
        (first_row_raster_last_reversed, "that is raster order"),
        (masking.raster, "raster order"),
        (masking.reversed_raster, "raster order"),
        (by_score(lambda b, n, g: torch.rand(b, n)), "draws from torch's global random state"),
        (seeds_torch, "draws from torch's global random state, or sets it"),
        (from_both, r"global random state, or sets it \(and from the generator, too\)"),
        (python_random, "Python's random module"),
        (seeds_the_generator, "sets the seed of the generator"),
        (by_batch_size, "another order in a batch of 1"),
        (counting(), "generators of the same state give two orders"),
        (needs_a_generator, "the generator may be None"),
    ],
)
def test_my_order(wrong, message):
    with pytest.raises(Failed, match=message):
        check.my_order(wrong)


def test_checking_an_order_leaves_the_random_states_alone():
    torch_state, state = torch.get_rng_state(), random.getstate()
    with pytest.raises(Failed):
        check.my_order(python_random)
    check.my_order(masking.random)
    assert torch.equal(torch_state, torch.get_rng_state()) and state == random.getstate()


@pytest.mark.parametrize("name", ["spiral", "halton", "random", "checkerboard"])
def test_orders_pass(name):
    assert check.my_order(masking.ORDERS[name]) is masking.ORDERS[name]


def test_right_solutions_pass():
    def mine(order, num_masked):
        turn = order.argsort(1)
        return turn >= order.shape[1] - num_masked

    def by_loop(order, num_masked):
        mask = torch.zeros(order.shape, dtype=torch.bool)
        for row, places in zip(mask, order, strict=True):
            row[places[len(places) - num_masked :]] = True
        return mask

    def by_known(order, num_masked):
        known = order[:, : order.shape[1] - num_masked]
        return torch.ones_like(order, dtype=torch.bool).scatter(1, known, False)

    def by_known_counts(length, num_iter):
        return tuple(free(length, num_iter, quarter_wave))

    def diagonals(height, width, batch_size, generator=None):
        place = torch.arange(height * width)
        order = (place // width + place % width).argsort(stable=True)
        return order.expand(batch_size, -1)

    assert check.my_order(diagonals) is diagonals
    by_lots = by_score(lambda b, n, g: torch.rand(b, n, generator=g))
    rolled = by_score(lambda b, n, g: (torch.arange(n) + torch.arange(1, b + 1)[:, None]) % n)
    assert check.mask_by_order(mine) is mine
    assert check.mask_by_order(by_loop) is by_loop
    assert check.mask_by_order(by_known) is by_known
    assert check.tokens_per_step(by_known_counts) is by_known_counts
    assert check.my_order(by_lots) is by_lots
    assert check.my_order(rolled) is rolled
    assert check.tokens_per_step(cosine) is cosine
