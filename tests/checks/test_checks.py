"""The mechanism of exercise checks: what is printed, what the notebook goes on with."""

import functools

import pytest
import torch

from mar_mini import checks
from mar_mini.checks import Failed

GOES_ON = "the notebook goes on with the package's"


def halves(total):
    """The package's own, in these tests."""
    return total / 2


class Scale:
    """The package's own class."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, x):
        return self.factor * x


@checks.exercise(reference=halves)
def check_halves(candidate):
    torch.rand(3)  # a check may draw numbers
    checks.close(candidate(torch.arange(4.0)), torch.tensor([0, 0.5, 1, 1.5]), "halves")


@checks.exercise(reference=Scale, name="Scale")
def check_scale(candidate):
    checks.close(candidate(3.0)(2.0), 6.0, "scaled")


@pytest.fixture(autouse=True)
def lenient(monkeypatch):
    monkeypatch.delenv("MAR_MINI_STRICT", raising=False)


def unwritten(total):
    raise NotImplementedError  # about 1 line


def wrong(total):
    return total / 4


def crashing(total):
    count = total.shape[0]
    parts = [total[count + i] for i in range(2)]
    return parts


def deep(total):
    return crashing(total)


def unimplemented_by_torch(total):
    raise NotImplementedError("Could not run 'aten::half'\nwith these arguments")


def returns_nothing(total):
    total / 2


def test_a_pass_goes_on_with_the_learners(capsys):
    def mine(total):
        return total * 0.5

    assert check_halves(mine) is mine
    assert capsys.readouterr().out == "check_halves: passed\n"


@pytest.mark.parametrize(
    ("learner", "line"),
    [
        (unwritten, f"not written yet, {GOES_ON}"),
        (wrong, f"halves[1] is 0.25, expected 0.5 (in 3 of 4 places); {GOES_ON}"),
        (returns_nothing, f"halves is None, expected a tensor; {GOES_ON}"),
        (None, f"expected a function, but what came is None; {GOES_ON}"),
        (3, f"expected a function, but what came is of type int; {GOES_ON}"),
        (
            crashing,
            "IndexError: index 4 is out of bounds for dimension 0 with size 4 "
            f"(line 3 of crashing: `parts = [total[count + i] for i in range(2)]`); {GOES_ON}",
        ),
        (
            deep,
            "IndexError: index 4 is out of bounds for dimension 0 with size 4 "
            f"(line 2 of deep: `return crashing(total)`); {GOES_ON}",
        ),
        (
            unimplemented_by_torch,
            "NotImplementedError: Could not run 'aten::half' with these arguments "
            '(line 2 of unimplemented_by_torch: `raise NotImplementedError("Could not run '
            f"'aten::half'\\nwith these arguments\")`); {GOES_ON}",
        ),
    ],
)
def test_anything_else_goes_on_with_the_packages_and_says_why(learner, line, capsys):
    assert check_halves(learner) is halves
    assert capsys.readouterr().out == f"check_halves: {line}\n"


def test_an_error_outside_the_learners_code_is_placed_in_the_check(capsys):
    @checks.exercise(reference=halves, name="halves")
    def check(candidate):
        candidate(torch.ones(2)).sum()

    check(returns_nothing)
    assert capsys.readouterr().out == (
        "halves: AttributeError: 'NoneType' object has no attribute 'sum' "
        f"(when the check called it or used its result); {GOES_ON}\n"
    )


def test_classes_are_checked_too(capsys):
    class Unwritten(Scale):
        def __call__(self, x):
            raise NotImplementedError

    class Crashing(Scale):
        @functools.cache  # noqa: B019
        def __call__(self, x):
            return x @ self.factor

    assert check_scale(Unwritten) is Scale
    assert check_scale(Crashing) is Scale
    assert check_scale(Scale(2)) is Scale
    unwritten_line, crash_line, instance_line = capsys.readouterr().out.splitlines()
    assert unwritten_line == f"Scale: not written yet, {GOES_ON}"
    assert "(line 3 of __call__: `return x @ self.factor`)" in crash_line
    assert "expected a class, but what came is of type Scale" in instance_line


def test_the_packages_own_passes_but_is_not_called_the_learners(capsys):
    assert check_halves(halves) is halves
    line = capsys.readouterr().out
    assert line.startswith("check_halves: passed (this is the package's")
    assert line.count("\n") == 1


def test_a_check_leaves_the_random_state_alone():
    torch.manual_seed(0)
    want = torch.rand(2)
    torch.manual_seed(0)
    check_halves(halves)
    assert torch.equal(torch.rand(2), want)


@pytest.mark.parametrize("learner", [unwritten, wrong, crashing, None])
def test_strict_mode_raises_chained(learner, monkeypatch, capsys):
    monkeypatch.setenv("MAR_MINI_STRICT", "1")
    with pytest.raises(Failed, match="^check_halves: ") as caught:
        check_halves(learner)
    assert caught.value.__cause__ is not None
    assert GOES_ON not in str(caught.value)
    assert check_halves(halves) is halves
    assert capsys.readouterr().out.count("\n") == 1


def test_the_reference_is_readable():
    assert check_scale.reference is Scale


MASK = torch.tensor([[True, False, True], [True, True, True]])


@pytest.mark.parametrize(
    ("compare", "message"),
    [
        (lambda: checks.same_shape(MASK, (3, 2), "mask"), "mask has shape (2, 3), expected (3, 2)"),
        (lambda: checks.same_shape([1], (1,), "mask"), "mask is of type list, expected a tensor"),
        (
            lambda: checks.same_dtype(MASK, torch.int64, "mask"),
            "mask has dtype torch.bool, expected torch.int64",
        ),
        (
            lambda: checks.equal(MASK, torch.ones(2, 3, dtype=torch.bool), "mask"),
            "mask[0, 1] is False, expected True (in 1 of 6 places)",
        ),
        (
            lambda: checks.equal(MASK.int(), MASK, "mask"),
            "mask has dtype torch.int32, expected torch.bool",
        ),
        (lambda: checks.equal([1, 3], (1, 2), "sizes"), "sizes[1] is 3, expected 2"),
        (lambda: checks.equal([1], [1, 2], "sizes"), "sizes has 1 entries, expected 2"),
        (lambda: checks.equal(2.0, 2, "count"), "count is of type float, expected 2 (int)"),
        (lambda: checks.equal(True, 1, "count"), "count is of type bool, expected 1 (int)"),
        (lambda: checks.equal(None, 4, "count"), "count is None, expected 4 (int)"),
        (lambda: checks.close(0.5, 0.25, "loss"), "loss is 0.5, expected 0.25"),
        (lambda: checks.close("x", 0.25, "loss"), "loss is of type str, expected a tensor"),
        (
            lambda: checks.close(torch.ones(3), torch.ones(3, 1), "z"),
            "z has shape (3,), expected (3, 1)",
        ),
        (
            lambda: checks.close(torch.tensor([1.0, torch.nan]), torch.ones(2), "z"),
            "z[1] is nan, expected 1 (in 1 of 2 places)",
        ),
        (
            lambda: checks.close(torch.tensor(1.00000001).double(), 1.0000001, "z", 0, 0),
            "z is 1.0, expected 1.0000001",
        ),
    ],
)
def test_comparisons_name_place_and_values(compare, message):
    with pytest.raises(Failed) as caught:
        compare()
    assert str(caught.value) == message


def test_comparisons_accept_what_is_right():
    checks.same_shape(MASK, [2, 3], "mask")
    checks.same_dtype(MASK, torch.bool, "mask")
    checks.equal(MASK, MASK.clone(), "mask")
    checks.equal((1, [2, 3]), [1, (2, 3)], "sizes")
    checks.close(torch.tensor(0.1), 0.1, "loss")
    checks.close(1, 1.0, "loss")
    checks.close(torch.ones(2, requires_grad=True), torch.ones(2, dtype=torch.float64), "z")
    checks.close(torch.full((2,), torch.inf), torch.full((2,), torch.inf), "z")
    with pytest.raises(Failed):
        checks.close(torch.tensor(1.001), 1.0, "loss")
    checks.close(torch.tensor(1.001), 1.0, "loss", rtol=0.01)
