"""Orders are permutations, schedules add up, masks are what the order says."""

import math
import statistics
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mar_mini.masking import (
    ORDERS,
    SCHEDULES,
    known_first,
    make_order,
    mask_by_order,
    masked_after,
    sample_mask_ratio,
    tokens_per_step,
)

SIDES = range(1, 13)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Orders ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ORDERS)
def test_an_order_is_a_permutation(name):
    """On every grid up to 12x12 and for 1 to 3 images."""
    for height in SIDES:
        for width in SIDES:
            for batch_size in (1, 2, 3):
                order = ORDERS[name](height, width, batch_size, generator())
                assert order.dtype == torch.int64
                assert order.shape == (batch_size, height * width)
                want = list(range(height * width))
                assert all(sorted(row) == want for row in order.tolist()), (height, width)


@pytest.mark.parametrize(
    ("name", "height", "width", "want"),
    [
        ("raster", 2, 3, [0, 1, 2, 3, 4, 5]),
        ("reversed_raster", 2, 3, [5, 4, 3, 2, 1, 0]),
        ("spiral", 3, 3, [0, 1, 2, 5, 8, 7, 6, 3, 4]),
        ("spiral", 3, 4, [0, 1, 2, 3, 7, 11, 10, 9, 8, 4, 5, 6]),
        ("spiral", 4, 2, [0, 1, 3, 5, 7, 6, 4, 2]),
        ("spiral", 1, 3, [0, 1, 2]),
        ("spiral", 3, 1, [0, 1, 2]),
        ("centre_out", 3, 3, [4, 1, 3, 5, 7, 0, 2, 6, 8]),
        ("centre_out", 2, 2, [0, 1, 2, 3]),
        ("centre_out", 2, 3, [1, 4, 0, 2, 3, 5]),
        # rows 1/2, 1/4, 3/4, 1/8, 5/8, 3/8; columns 1/3, 2/3, 1/9, 4/9, 7/9, 2/9
        ("halton", 2, 3, [4, 2, 3, 1, 5, 0]),
        ("halton", 4, 4, [9, 6, 12, 1, 11, 4, 14, 3, 8, 5, 0, 7, 13, 2, 15, 10]),
    ],
)
def test_an_order_written_out(name, height, width, want):
    assert ORDERS[name](height, width, 2, None).tolist() == [want, want]


def test_spiral_walks_from_cell_to_neighbour():
    for height in SIDES:
        for width in SIDES:
            row, column = np.divmod(ORDERS["spiral"](height, width, 1)[0].numpy(), width)
            steps = np.abs(np.diff(row)) + np.abs(np.diff(column))
            assert (steps == 1).all(), (height, width)


def test_centre_out_never_comes_nearer():
    for height in SIDES:
        for width in SIDES:
            order = ORDERS["centre_out"](height, width, 1)[0].tolist()
            # four times the squared distance: whole numbers
            away = [
                ((2 * (place // width) - height + 1) ** 2 + (2 * (place % width) - width + 1) ** 2)
                for place in order
            ]
            keys = list(zip(away, order, strict=True))
            assert keys == sorted(keys), (height, width)


def test_checkerboard_finishes_one_colour_before_the_other():
    for height in SIDES:
        for width in SIDES:
            for row in ORDERS["checkerboard"](height, width, 2, generator()).tolist():
                colours = [(place // width + place % width) % 2 for place in row]
                assert colours == sorted(colours), (height, width)


@pytest.mark.parametrize(
    ("height", "width"), [(2, 3), (4, 3), (2, 1), (8, 3), (1, 3), (16, 3), (4, 9), (2, 27)]
)
def test_halton_visits_each_box_once_in_a_round(height, width):
    """On a grid of 2^a x 3^b cells the first points of the sequence meet each cell exactly once.

    So the order is the sequence, and any six in a row lie in six different ones of 2 x 3 boxes.
    """

    def inverse(i, base):  # in whole numbers: (numerator, denominator)
        top, bottom = 0, 1
        while i:
            i, digit = divmod(i, base)
            top, bottom = top * base + digit, bottom * base
        return top, bottom

    want = []
    for i in range(1, height * width + 1):
        (y, rows), (x, columns) = inverse(i, 2), inverse(i, 3)
        want.append(y * height // rows * width + x * width // columns)
    assert sorted(want) == list(range(height * width))
    assert ORDERS["halton"](height, width, 1)[0].tolist() == want


def test_halton_is_spread_sooner_than_raster():
    """After a quarter of the places each quadrant of a 12x12 grid has its share, within 2."""
    first = ORDERS["halton"](12, 12, 1)[0, :36].numpy()
    quadrant = first // 12 // 6 * 2 + first % 12 // 6
    assert np.abs(np.bincount(quadrant, minlength=4) - 9).max() <= 2


@pytest.mark.parametrize("name", ["random", "checkerboard"])
def test_a_random_order_follows_its_generator(name):
    first = ORDERS[name](6, 5, 3, generator(1))
    assert torch.equal(ORDERS[name](6, 5, 3, generator(1)), first)
    assert not torch.equal(ORDERS[name](6, 5, 3, generator(2)), first)
    assert len({tuple(row) for row in first.tolist()}) == 3
    torch.manual_seed(5)
    without = ORDERS[name](6, 5, 3, None)
    torch.manual_seed(5)
    assert torch.equal(ORDERS[name](6, 5, 3, None), without)
    assert not torch.equal(ORDERS[name](6, 5, 3, None), without)


def test_random_begins_everywhere_alike():
    """6000 orders of 6 places: each place is first about 1000 times."""
    first = ORDERS["random"](2, 3, 6000, generator())[:, 0]
    counts = first.bincount(minlength=6)
    assert (counts - 1000).abs().max() < 5 * math.sqrt(6000 * 1 / 6 * 5 / 6)


@pytest.mark.parametrize("name", sorted(set(ORDERS) - {"random", "checkerboard"}))
def test_other_orders_draw_nothing(name):
    g = generator()
    before = g.get_state()
    ORDERS[name](4, 4, 2, g)
    assert torch.equal(g.get_state(), before)


# make_order --------------------------------------------------------------------------------------


def test_make_order_by_name():
    assert torch.equal(make_order("spiral", 3, 4, 2), ORDERS["spiral"](3, 4, 2))
    assert torch.equal(
        make_order("random", 3, 4, 2, generator(3)), ORDERS["random"](3, 4, 2, generator(3))
    )


def test_make_order_names_those_there_are():
    with pytest.raises(ValueError, match="unknown order 'zigzag'.*random, raster.*halton"):
        make_order("zigzag", 3, 3, 1)


def test_make_order_takes_a_function():
    given = []

    def columns_first(height, width, batch_size, g):
        given.append((height, width, batch_size, g))
        return torch.arange(height * width).reshape(height, width).T.flatten().repeat(batch_size, 1)

    g = generator()
    want = [[0, 3, 1, 4, 2, 5]] * 2
    assert make_order(columns_first, 2, 3, 2, g).tolist() == want
    assert given == [(2, 3, 2, g)]
    assert make_order(partial(columns_first), 2, 3, 2, None).tolist() == want


WRONG = {
    "list": ([[0, 1, 2, 3]], r"mine returned is list; expected .*int64.* \(1, 4\)"),
    "nothing": (None, "mine returned is NoneType; expected .*int64"),
    "int32": (torch.arange(4, dtype=torch.int32)[None], "mine returned is torch.int32; expected"),
    "float": (torch.arange(4.0)[None], "mine returned is torch.float32; expected .*int64"),
    "flat": (torch.arange(4), r"mine returned has shape \(4,\); expected \(1, 4\), one row"),
    "grid": (torch.arange(4).reshape(1, 2, 2), r"mine returned has shape \(1, 2, 2\); expected"),
    "two rows": (torch.arange(4).repeat(2, 1), r"mine returned has shape \(2, 4\); expected"),
    "short": (torch.arange(3)[None], r"mine returned has shape \(1, 3\); expected \(1, 4\)"),
    "twice": (torch.tensor([[0, 1, 1, 3]]), "row 0 of what mine returned is not a permutation"),
    "from 1": (torch.tensor([[1, 2, 3, 4]]), "not a permutation of 0 to 3; each place of the 2x2"),
    "negative": (torch.tensor([[0, 1, 2, -1]]), "row 0 of what mine returned is not a permutation"),
}


@pytest.mark.parametrize("what", WRONG)
def test_make_order_says_what_a_function_returned(what):
    result, message = WRONG[what]

    def mine(height, width, batch_size, g):
        return result

    with pytest.raises(ValueError, match=message):
        make_order(mine, 2, 2, 1)


def test_make_order_names_the_wrong_row():
    rows = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0], [0, 0, 0, 0]])
    with pytest.raises(ValueError, match="row 2 of what the order function returned is not"):
        make_order(partial(lambda *_: rows), 2, 2, 3)


# Masks -------------------------------------------------------------------------------------------


@given(
    height=st.integers(1, 8),
    width=st.integers(1, 8),
    batch_size=st.integers(1, 3),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=50, deadline=None)
def test_the_mask_is_the_end_of_the_order(height, width, batch_size, seed):
    length = height * width
    order = ORDERS["random"](height, width, batch_size, generator(seed))
    last = None
    for num_masked in range(length, -1, -1):
        mask = mask_by_order(order, num_masked)
        assert mask.dtype == torch.bool and mask.shape == order.shape
        assert (mask.sum(1) == num_masked).all()
        assert not mask.gather(1, order[:, : length - num_masked]).any()  # first come, first known
        if last is not None:
            assert not (mask & ~last).any()  # what is known stays known
        last = mask


def test_a_mask_written_out():
    order = torch.tensor([[2, 0, 3, 1], [0, 1, 2, 3]])
    assert mask_by_order(order, 3).int().tolist() == [[1, 1, 0, 1], [0, 1, 1, 1]]
    assert mask_by_order(order, 4).all() and not mask_by_order(order, 0).any()
    assert order.tolist() == [[2, 0, 3, 1], [0, 1, 2, 3]]  # not written to


# Mask ratios -------------------------------------------------------------------------------------


def draw_ratios(lowest: float, n: int, seed: int = 0) -> np.ndarray:
    g = generator(seed)
    return np.array([sample_mask_ratio(lowest, g) for _ in range(n)])


def by_rejection(lowest: float, n: int) -> np.ndarray:
    """The same distribution by another way: draw normals, keep those in [lowest, 1]."""
    x = np.random.default_rng(0).normal(1.0, 0.25, size=20 * n)
    kept = x[(x >= lowest) & (x <= 1)]
    assert len(kept) >= n
    return kept[:n]


@pytest.mark.parametrize("lowest", [0.7, 0.5, 0.0])
def test_mask_ratios_are_of_the_truncated_normal(lowest):
    n = 4000
    ratios, other = draw_ratios(lowest, n), by_rejection(lowest, 10 * n)
    assert ratios.min() >= lowest and ratios.max() <= 1
    # Kolmogorov-Smirnov: the largest distance of the two cumulative distributions
    grid = np.sort(np.concatenate([ratios, other]))
    distance = np.abs(
        np.searchsorted(np.sort(ratios), grid, "right") / n
        - np.searchsorted(np.sort(other), grid, "right") / len(other)
    ).max()
    assert distance < 1.95 * math.sqrt(1 / n + 1 / len(other))  # exceeded with chance 0.001


def test_mask_ratios_follow_their_generator():
    assert (draw_ratios(0.7, 5, seed=1) == draw_ratios(0.7, 5, seed=1)).all()
    assert (draw_ratios(0.7, 5, seed=1) != draw_ratios(0.7, 5, seed=2)).all()
    torch.manual_seed(3)
    first = [sample_mask_ratio(0.7) for _ in range(3)]
    torch.manual_seed(3)
    assert [sample_mask_ratio(0.7) for _ in range(3)] == first
    assert len(set(first)) == 3


@given(seed=st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_a_smallest_ratio_of_one_hides_everything(seed):
    assert sample_mask_ratio(1.0, generator(seed)) == 1.0


def test_another_spread():
    wide, narrow = (
        np.array([sample_mask_ratio(0.0, generator(i), std) for i in range(500)])
        for std in (0.25, 0.01)
    )
    assert narrow.min() > 0.95 > 0.75 > wide.min()


# Tokens per step ---------------------------------------------------------------------------------

SHAPES = {
    **SCHEDULES,
    "convex": lambda i, n: (1 - i / n) ** 4,
    "all at once": lambda i, n: 0.0,
    "nothing until the end": lambda i, n: 1.0,
    "rising": lambda i, n: i / n,
    "out of range": lambda i, n: 3 - 6 * i / n,
}


@pytest.mark.parametrize("name", SHAPES)
def test_tokens_per_step_add_up(name):
    schedule = name if name in SCHEDULES else SHAPES[name]
    for length in range(1, 65):
        for num_iter in range(1, length + 1):
            counts = tokens_per_step(length, num_iter, schedule)
            assert len(counts) == num_iter and sum(counts) == length and min(counts) >= 1


@given(
    length=st.integers(1, 300),
    share=st.floats(0, 1),
    table=st.lists(st.floats(0, 1), min_size=1, max_size=20),
)
@settings(max_examples=100, deadline=None)
def test_tokens_per_step_add_up_for_any_schedule(length, share, table):
    num_iter = max(1, round(share * length))

    def schedule(i, n):
        return table[i * len(table) // n]

    counts = tokens_per_step(length, num_iter, schedule)
    assert len(counts) == num_iter and sum(counts) == length and min(counts) >= 1
    after = masked_after(length, num_iter, schedule)
    assert after == [length - sum(counts[: i + 1]) for i in range(num_iter)]


def test_tokens_per_step_written_out():
    # 16 times the cosines of 22.5, 45 and 67.5 degrees: 14.8, 11.3 and 6.1 are left
    assert tokens_per_step(16, 4) == [2, 3, 5, 6]
    assert tokens_per_step(16, 4, "linear") == [4, 4, 4, 4]
    assert tokens_per_step(16, 4, lambda i, n: (1 - i / n) ** 2) == [7, 5, 3, 1]
    assert tokens_per_step(8, 8) == [1] * 8
    assert tokens_per_step(8, 1) == [8]
    assert tokens_per_step(5, 4, lambda i, n: 0.0) == [2, 1, 1, 1]
    assert tokens_per_step(5, 4, lambda i, n: 1.0) == [1, 1, 1, 2]


def test_cosine_is_the_published_formula():
    """golden/README.md, "Steps": where it is left to itself, each step still predicts a token."""
    for length in range(1, 65):
        for num_iter in range(1, length + 1):
            want = [length]
            for i in range(1, num_iter):
                left = math.floor(length * math.cos(math.pi / 2 * i / num_iter))
                want.append(max(1, min(want[-1] - 1, left)))
            assert masked_after(length, num_iter) == [*want[1:], 0], (length, num_iter)


def test_linear_divides_evenly_where_it_can():
    for length in range(1, 65):
        for num_iter in range(1, length + 1):
            if length % num_iter == 0:
                counts = tokens_per_step(length, num_iter, "linear")
                assert set(counts) == {length // num_iter}, (length, num_iter)


def test_a_schedule_is_asked_for_every_step_but_the_last():
    asked = []
    tokens_per_step(10, 5, lambda i, n: asked.append((i, n)) or 1 - i / n)
    assert asked == [(1, 5), (2, 5), (3, 5), (4, 5)]


@pytest.mark.parametrize("num_iter", [-1, 0, 17, 100])
def test_too_few_or_too_many_steps(num_iter):
    with pytest.raises(ValueError, match=f"num_iter is {num_iter}; expected 1 to 16, since each"):
        tokens_per_step(16, num_iter)


def test_an_unknown_schedule():
    with pytest.raises(ValueError, match="schedule 'sine'; expected one of: cosine, linear"):
        tokens_per_step(16, 4, "sine")


def test_the_mean_of_the_ratio_is_what_the_formula_says():
    """1 - std * (phi(0) - phi(a)) / (Phi(0) - Phi(a)) for a = (0.7 - 1) / 0.25: 0.867."""
    normal, a = statistics.NormalDist(), -1.2
    mean = 1 - 0.25 * (normal.pdf(0) - normal.pdf(a)) / (normal.cdf(0) - normal.cdf(a))
    assert mean == pytest.approx(0.867, abs=5e-4)
    n = 4000
    ratios = draw_ratios(0.7, n, seed=7)
    assert abs(ratios.mean() - mean) < 5 * ratios.std() / math.sqrt(n)


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), st.data())
@settings(deadline=None)
def test_known_places_come_first_and_the_others_keep_their_turn(batch_size, height, width, data):
    count = data.draw(st.integers(0, height * width))
    order = ORDERS["random"](height, width, batch_size, generator(1))
    known = ~mask_by_order(ORDERS["random"](height, width, batch_size, generator(2)), count)
    for row, given_places, got in zip(order, known, known_first(order, known), strict=True):
        in_turn = [[p for p in row.tolist() if given_places[p] == kind] for kind in (True, False)]
        assert got.tolist() == in_turn[0] + in_turn[1]
