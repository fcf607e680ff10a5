"""The checks of chapter 6 refuse plausible mistakes, each by the name of its idea."""

import math

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


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (upside_down, "upside down"),
        (first_not_last, "whose turn comes first"),
        (last_places, "last places of the picture"),
        (places_for_turns, "they are places"),
        (all_rows, "places of all rows in every row"),
        (first_row, "first row's order"),
        (minus_zero, r"\(order, 0\) masks everything: a slice"),
        (one_too_few, r"masks \[11, 11, 11, 11, 11\] tokens .* expected 12"),
        (whole_numbers, "dtype torch.int64, expected torch.bool"),
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


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
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
        (lambda n, k: torch.tensor(cosine(n, k)), "is a Tensor, expected a list of int"),
    ],
)
def test_tokens_per_step(wrong, message):
    with pytest.raises(Failed, match=message):
        check.tokens_per_step(wrong)


def one_row(height, width, batch_size, generator=None):
    return masking.spiral(height, width, 1)


def square_only(height, width, batch_size, generator=None):
    return torch.arange(height**2).flip(0).expand(batch_size, -1)


def with_repeats(height, width, batch_size, generator=None):
    return torch.randint(height * width, (batch_size, height * width))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (one_row, r"has shape \(1, 16\); expected \(3, 16\)"),
        (square_only, r"for height 3, width 5: what square_only returned has shape"),
        (with_repeats, "not a permutation"),
        (masking.raster, "raster order"),
        (masking.reversed_raster, "raster order"),
    ],
)
def test_my_order(wrong, message):
    with pytest.raises(Failed, match=message):
        check.my_order(wrong)


@pytest.mark.parametrize("name", ["spiral", "halton", "random", "checkerboard"])
def test_orders_pass(name):
    assert check.my_order(masking.ORDERS[name]) is masking.ORDERS[name]


def test_right_solutions_pass():
    def mine(order, num_masked):
        turn = order.argsort(1)
        return turn >= order.shape[1] - num_masked

    assert check.mask_by_order(mine) is mine
    assert check.tokens_per_step(cosine) is cosine
