"""What every exercise check is made of.

A chapter's checks are functions that try a learner's object and raise `Failed` with what is
wrong. `exercise` turns such a function into a checkpoint: it prints one line and returns what
the notebook goes on with, the learner's object if it passes, else the package's.

    @exercise(reference=masking.mask_by_order)
    def mask_by_order(candidate):
        equal(candidate(order, 3), want, "mask")

    mask_by_order = check.mask_by_order(mask_by_order)  # in the notebook

With `MAR_MINI_STRICT=1` in the environment anything but a pass raises. Only this part of the
package prints: here it is the purpose.
"""

import functools
import inspect
import linecache
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import CodeType
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["Failed", "close", "equal", "exercise", "refuse_mistakes", "same_dtype", "same_shape"]

T = TypeVar("T")
GOES_ON = "the notebook goes on with the package's"
LONGEST = 400  # characters of an error message that a one-line report keeps


class Failed(AssertionError):
    """A check's message to the learner: what is wrong, with which numbers."""


def exercise(
    reference: T, *, name: str | None = None
) -> Callable[[Callable[[T], None]], Callable[[object], T]]:
    """Make a test of one object into a checkpoint `check(learner)`.

    reference: the package's own function or class. The notebook goes on with it unless the
        learner's object passes. It stays readable as `check.reference`.
    name: what the printed line begins with; the test's own name if left out.

    The checkpoint leaves torch's global random state as it found it, so a notebook shows the
    same numbers solved or not. In strict mode it raises `Failed`, chained to the cause.
    """

    def decorate(test: Callable[[T], None]) -> Callable[[object], T]:
        label = name or test.__name__

        @functools.wraps(test)
        def check(learner):
            try:
                _expect_kind(learner, reference)
                with torch.random.fork_rng(devices=[]):
                    test(learner)
            except Exception as error:
                # torch raises NotImplementedError too, but never without a message
                unwritten = isinstance(error, NotImplementedError) and not error.args
                problem = "not written yet" if unwritten else _explain(error, learner)
                if os.environ.get("MAR_MINI_STRICT") == "1":
                    raise Failed(f"{label}: {problem}") from error
                print(f"{label}: {problem}{',' if unwritten else ';'} {GOES_ON}")
                return reference
            # after an earlier failure the name is bound to the package's: no pass for the learner
            own = " (this is the package's: run the cell with yours again to check it)"
            print(f"{label}: passed{own if learner is reference else ''}")
            return learner

        check.reference = reference
        return check

    return decorate


def same_shape(got: object, want_shape: Sequence[int], what: str) -> None:
    """Expect a tensor of this shape; raises `Failed` naming both shapes."""
    shape, want = tuple(_tensor(got, what).shape), tuple(want_shape)
    if shape != want:
        raise Failed(f"{what} has shape {shape}, expected {want}")


def same_dtype(got: object, want_dtype: torch.dtype, what: str) -> None:
    """Expect a tensor of this dtype; raises `Failed` naming both dtypes."""
    dtype = _tensor(got, what).dtype
    if dtype != want_dtype:
        raise Failed(f"{what} has dtype {dtype}, expected {want_dtype}")


def close(
    got: object, want: Tensor | float, what: str, rtol: float = 1e-4, atol: float = 1e-5
) -> None:
    """Expect |got - want| <= atol + rtol * |want| everywhere, whatever the dtypes.

    want: a tensor, or a number (then a number or a tensor with one value and no axes will do).
    Raises `Failed` with the first value that is off, and how many are.
    """
    if not isinstance(want, Tensor):
        got = torch.as_tensor(got) if isinstance(got, (int, float)) else got
        want = torch.as_tensor(want, dtype=torch.float64)
    same_shape(got, want.shape, what)
    got, want = (x.detach().cpu().to(torch.float64) for x in (got, want))
    _all_good(torch.isclose(got, want, rtol=rtol, atol=atol, equal_nan=True), got, want, what)


def equal(got: object, want: object, what: str) -> None:
    """Expect exactly this: a tensor's shape, dtype and values, or a Python value and its type.

    Lists and tuples stand for each other and are compared entry by entry.
    Raises `Failed` with the first value that is off.
    """
    if isinstance(want, Tensor):
        same_shape(got, want.shape, what)
        same_dtype(got, want.dtype, what)
        got, want = got.detach().cpu(), want.detach().cpu()
        _all_good(got == want, got, want, what)
    elif isinstance(want, (list, tuple)) and isinstance(got, (list, tuple)):
        if len(got) != len(want):
            raise Failed(f"{what} has {len(got)} entries, expected {len(want)}")
        for index, (one, wanted) in enumerate(zip(got, want, strict=True)):
            equal(one, wanted, f"{what}[{index}]")
    elif type(got) is not type(want):
        raise Failed(f"{what} is {_kind(got)}, expected {want!r} ({type(want).__name__})")
    elif got != want:
        raise Failed(f"{what} is {got!r}, expected {want!r}")


def refuse_mistakes(got: object, want: object, mistakes: dict[str, object], what: str) -> None:
    """Expect anything but a known mistake; raises `Failed` with the name of the one that came.

    mistakes: what a wrong idea would have given, by a sentence that says which idea it is. One
        that happens to give what is wanted is passed over.
    """
    for idea, value in mistakes.items():
        if _same(got, value) and not _same(value, want):
            raise Failed(f"{what} {idea}")


def _same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        # as close as `close` asks: another order of operations rounds otherwise
        return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-5)
    return type(a) is type(b) and a == b


def _all_good(good: Tensor, got: Tensor, want: Tensor, what: str) -> None:
    wrong = (~good).nonzero()
    if len(wrong):
        at = tuple(wrong[0].tolist())
        place = f"[{', '.join(map(str, at))}]" if at else ""
        many = f" (in {len(wrong)} of {good.numel()} places)" if at else ""
        values = [got[at].item(), want[at].item()]
        texts = [f"{v:.6g}" if isinstance(v, float) else repr(v) for v in values]
        shown = texts if texts[0] != texts[1] else map(repr, values)
        raise Failed("{}{} is {}, expected {}{}".format(what, place, *shown, many))


def _tensor(got: object, what: str) -> Tensor:
    if not isinstance(got, Tensor):
        raise Failed(f"{what} is {_kind(got)}, expected a tensor")
    return got


def _kind(value: object) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"


def _expect_kind(learner: object, reference: object) -> None:
    wanted = "a class" if inspect.isclass(reference) else "a function"
    if not callable(learner) or (wanted == "a class" and not inspect.isclass(learner)):
        raise Failed(f"expected {wanted}, but what came is {_kind(learner)}")


def _explain(error: Exception, learner: object) -> str:
    text = " ".join(str(error).split())
    text = text if len(text) <= LONGEST else text[:LONGEST] + "..."
    if isinstance(error, Failed):
        return text
    return f"{type(error).__name__}{': ' if text else ''}{text} ({_where(error, learner)})"


def _where(error: Exception, learner: object) -> str:
    """Say which line of the learner's code the error came through last."""
    codes = list(_codes(learner))
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        for code in codes:
            last = max(n for *_, n in code.co_lines() if n)
            nested = frame.f_code.co_filename == code.co_filename
            if nested and code.co_firstlineno <= line <= last:
                source = linecache.getline(code.co_filename, line).strip()
                number = line - code.co_firstlineno + 1
                return f"line {number} of {code.co_name}" + (f": `{source}`" if source else "")
    return "when the check called it or used its result"


def _codes(learner: object) -> Iterator[CodeType]:
    plain = inspect.isroutine(learner) or hasattr(learner, "__wrapped__")
    owner = learner if inspect.isclass(learner) else type(learner)
    for member in [learner] if plain else vars(owner).values():
        member = getattr(member, "__func__", None) or getattr(member, "fget", None) or member
        code = getattr(inspect.unwrap(member), "__code__", None)
        if code is not None:
            yield code
