"""Checks of chapter 10: parameters of a block, a plan that fits, the effective batch."""

import math
import operator
from collections.abc import Sequence
from functools import cache, partial
from itertools import permutations
from numbers import Real

import torch

from mar_mini import configs
from mar_mini.checks import Failed, close, equal, exercise, refuse_mistakes
from mar_mini.planner import memory as planning


def _whole(value: object) -> object:
    """A whole number of any library as Python's own; anything else, and a tensor, as it is."""
    if isinstance(value, torch.Tensor):
        return value
    try:
        return operator.index(value)
    except TypeError:
        return value


def _refuse_ideas(
    got: Sequence, want: Sequence, ideas: Sequence[dict[str, object]], what: Sequence[str]
) -> None:
    """Refuse an idea that explains the results of *all* cases: in a single one several agree.

    Entry by entry: what came, what is right, what each idea gives, and the case in words.
    """
    for idea in ideas[0]:
        if all(_same(x, case[idea]) for x, case in zip(got, ideas, strict=True)):
            off = [i for i, case in enumerate(ideas) if case[idea] != want[i]]
            if off:
                raise Failed(f"{what[off[0]]} {idea}")


def _same(a: object, b: object) -> bool:
    return type(a) is type(b) and a == b


@exercise(reference=planning.block_parameters)
def block_parameters(candidate):
    what, want, got, ideas = [], [], [], []
    for d, ratio in ((6, 2.5), (10, 4.0), (5, 1.5), (768, 4.0)):
        what.append(f"block_parameters({d}, {ratio})")
        want.append(planning.block_parameters(d, ratio))
        got.append(_whole(candidate(d, ratio)))
        if isinstance(got[-1], torch.Tensor):
            raise Failed(
                f"{what[-1]} is a tensor, expected {want[-1]} (int): sizes alone are needed"
            )
        if isinstance(got[-1], float) and got[-1] == want[-1]:
            raise Failed(
                f"{what[-1]} is {got[-1]}, a float; the hidden layer has "
                "int(dim * mlp_ratio) values, a whole number"
            )
        ideas.append(_block_ideas(d, ratio))
    _refuse_ideas(got, want, ideas, what)
    _equal_all(got, want, what)


def _equal_all(got: Sequence, want: Sequence, what: Sequence[str]) -> None:
    for case in zip(got, want, what, strict=True):
        equal(*case)


def _block_ideas(d: int, ratio: float) -> dict[str, object]:
    h, want = int(d * ratio), planning.block_parameters(d, ratio)
    return {
        "counts matrices alone, 12 D^2 at the usual ratio; each linear layer has biases too, "
        "and there are two norms": want - h - 9 * d,
        "counts no biases of the linear layers": want - h - 5 * d,
        "leaves out the norms, or the biases of `qkv` and `proj`; both make 4 D: each norm has a "
        "scale and a shift": want - 4 * d,
        "counts 2 D for the norms, expected 4 D (there are two, each with a scale and a shift), "
        "or D biases for `qkv`, expected 3 D": want - 2 * d,
        "has one matrix for queries, keys and values; `qkv` makes three vectors of D": (
            want - 2 * d * d - 2 * d
        ),
        "leaves out the biases of `qkv`": want - 3 * d,
        "leaves out `proj`, the layer that mixes what the heads found": want - d * d - d,
        "leaves out the biases of `proj`, or those of `fc2`; D each": want - d,
        "leaves out the biases of `fc1`, one for each value of the hidden layer": want - h,
        "counts D biases for `fc1`; it has one for each value of the hidden layer": want - h + d,
        "leaves out the attention": want - 4 * d * d - 4 * d,
        "leaves out the MLP": want - 2 * d * h - h - d,
        "counts one layer of the MLP; it goes to the hidden layer and back": want - d * h - d,
        "counts the second layer of the MLP alone; the first goes to the hidden layer": (
            want - d * h - h
        ),
        "counts the MLP's first layer twice; the second one's biases are D": want + h - d,
        "leaves out the biases of the MLP": want - h - d,
        "takes the hidden layer to be as wide as D": 6 * d * d + 10 * d,
        "takes the hidden layer to be 4 D whatever `mlp_ratio` says": 12 * d * d + 13 * d,
        "rounds the width of the hidden layer; `int` cuts off": (
            want + (math.ceil(d * ratio) - h) * (2 * d + 1)
        ),
        "cuts off at the end; the hidden layer itself has int(dim * mlp_ratio) values": (
            int(want + (d * ratio - h) * (2 * d + 1))
        ),
        "counts FLOPs of a row, two for each weight": 8 * d * d + 4 * d * h,
        "is in bytes; count the numbers": 4 * want,
    }


# parameters, bytes an image, GB, batch, processes: any number up to 12 divides 27,720; the last
# three: the state alone is too large, one image fits, what fits does so to the byte
RUNS = [
    (250_000_000, 9.8e7, 6.0, 27_720, 1),
    (250_000_000, 9.8e7, 6.0, 83_160, 3),
    (10_000_000, 1e7, 1.0, 2048, 1),
    (1_000_000, 1e7, 1.0, 720, 1),
    (30_000_000, 2.3e7, 2.0, 960, 3),
    (10_000_000, 1e7, 4.0, 96, 4),
    (12_000_000, 1e7, 0.5, 630, 2),
    (10_000_000, 1e7, 0.2299, 2048, 1),
    (1_000_000_000, 1e8, 12.0, 64, 1),
    (10_000_000, 1e8, 0.35, 64, 1),
    (62_500_000, 6.25e7, 1.5, 64, 1),
    (5_000_000, 1e8, 1.0, 9, 1),
]


@cache
def _divisors(share: int) -> list[int]:
    return [n for n in range(1, share + 1) if share % n == 0]


def _fit(most: float, share: int) -> tuple[int, int]:
    """The largest divisor of a share that is at most that, and how often it goes into the share."""
    return _largest([n for n in _divisors(share) if n <= most], share)


def _largest(sizes: list[int], share: int) -> tuple[int, int]:
    return (sizes[-1], share // sizes[-1]) if sizes else (0, 0)


@exercise(reference=planning.plan_run)
def plan_run(candidate):
    what, want, got, ideas = [], [], [], []
    for run in RUNS:
        count, image, memory, batch, processes = run
        what.append(f"plan_run({count:,}, {image:g}, {memory:g}, {batch}, {processes})")
        want.append(planning.plan_run(*run))
        try:
            plan = candidate(*run)
        except (ValueError, ZeroDivisionError) as error:
            if want[-1] == (0, 0):
                error.args = (f"{what[-1]}: no image fits, expected (0, 0) ({error})",)
            raise
        got.append(tuple(map(_whole, plan)) if isinstance(plan, (list, tuple)) else plan)
        ideas.append(_plan_ideas(*run))
    _refuse_ideas(got, want, ideas, what)
    for run, plan, right, words in zip(RUNS, got, want, what, strict=True):
        count, image, memory, batch, processes = run
        if isinstance(plan, tuple) and plan != right and all(type(x) is int for x in plan):
            if len(plan) == 2 and plan[0] > 0 and plan[0] * plan[1] != batch // processes:
                raise Failed(
                    f"{words} is {plan}: {plan[0]} times {plan[1]} images, but the "
                    f"process computes {batch // processes} in a step"
                )
            raise Failed(
                f"{words} is {plan}, expected {right}: state is 22 bytes a parameter, "
                f"{22 * count / 1e9:g} of the {memory:g} GB; an image takes {image / 1e9:g} GB, "
                f"and the process computes {batch // processes} of them"
            )
        equal(plan, right, words)


def _plan_ideas(
    count: int, image: float, memory: float, batch: int, processes: int
) -> dict[str, object]:
    """What each wrong idea makes of a run."""
    want = planning.plan_run(count, image, memory, batch, processes)
    share, free = batch // processes, 1e9 * memory - 22 * count
    most = max(0, math.floor(free / image))
    any_size = min(most, share)

    def fitted(state=22 * count, gb=1e9, all_=share, memory=memory):
        return _fit((gb * memory - state) / image, all_)

    return {
        "is the wrong way round: first the micro batch, then how many of them": want[::-1],
        "leaves out the state: weights, gradients, moments, average and copies take 22 bytes "
        "a parameter": fitted(0),
        "counts the weights alone as state": fitted(4 * count),
        "counts weights and gradients alone as state; AdamW keeps two moments, and there is "
        "the weight average": fitted(8 * count),
        "leaves out what AdamW keeps, 8 bytes of moments a parameter": fitted(14 * count),
        "leaves out 4 bytes of state a parameter; weights, gradients, two moments and the "
        "average take 4 each, copies 2": fitted(18 * count),
        "leaves out both the average and the copies: 22 bytes a parameter, not 16": (
            fitted(16 * count)
        ),
        "leaves out the bfloat16 copies of the weights, 2 bytes a parameter": fitted(20 * count),
        "takes the state for each image; it is there once": (
            _fit(1e9 * memory / (image + 22 * count), share)
        ),
        "takes a memory that the state alone overflows for free memory: there is none, and "
        "nothing fits": _fit(abs(free) / image, share),
        "takes a GB for 2^30 bytes, which are a GiB; here it is 10^9": fitted(gb=2**30),
        "keeps a tenth of the memory back; here all of it may be used": fitted(gb=9e8),
        "shares out the memory among the processes; each has a GPU of its own": (
            fitted(memory=memory / processes)
        ),
        "takes the memory for bytes; it is in GB, 10^9 bytes": fitted(gb=1),
        "needs memory for one image only, however large the micro batch; each of its images "
        "leaves activations": (share, 1) if most >= 1 else (0, 0),
        "shares out the state among the processes; each has a whole model of its own": (
            fitted(22 * count / processes)
        ),
        "adds up memory of all processes; a micro batch must fit into one GPU": (
            fitted(memory=memory * processes)
        ),
        "makes micro batches of the whole batch; a process computes its share alone, "
        "batch // processes": fitted(all_=batch),
        "counts the micro batches of the whole batch; a process computes its share alone": (
            (want[0], batch // want[0]) if want[0] else want
        ),
        "divides the number of micro batches by the processes once more": (
            (want[0], want[1] // processes)
        ),
        "has a micro batch that does not divide the process's share: the rest of its images "
        "would be lost": (any_size, share // any_size) if most else (0, 0),
        "has a micro batch that does not divide the process's share; the last one would be "
        "smaller": (any_size, -(-share // any_size)) if most else (0, 0),
        "rounds memory and state to images one by one: subtract the state, then divide": (
            _fit(math.floor(1e9 * memory / image) - math.floor(22 * count / image), share)
        ),
        "rounds how many images fit; a part of one does not": _fit(round(free / image), share),
        "leaves out what fits to the byte: with `<` the last image has no place": (
            _largest([n for n in _divisors(share) if n * image < free], share)
        ),
        "takes one image too few: `range(1, n)` ends before n": _fit(most - 1, share),
        "leaves out a micro batch of one image, which fits anything that fits at all": (
            _largest([n for n in _divisors(share) if 2 <= n <= most], share)
        ),
        "leaves out the whole share as a single micro batch": (
            _largest([n for n in _divisors(share)[:-1] if n <= most], share)
        ),
        "takes powers of two alone; any divisor of the share will do": (
            _largest([n for n in _divisors(share) if n <= most and n & (n - 1) == 0], share)
        ),
        "takes the smallest micro batch; the largest that fits is the fastest": (
            (1, share) if most else (0, 0)
        ),
        "takes the smallest micro batch, and where nothing fits, too; expected the largest that "
        "fits": (1, share),
    }


RECIPES = [
    ((6, 5, 7), {"images": 10_000, "epochs": 3, "blr": 2e-4}),
    ((64, 1, 32), {"images": 1_281_167, "epochs": 400}),
    ((3, 8, 2), {"images": 5000, "epochs": 2.5, "blr": 3e-3}),
    ((32, 4, 2), {"images": 50_000, "epochs": 12, "blr": 1e-3}),
]


@exercise(reference=configs.scaled_recipe)
def scaled_recipe(candidate):
    for (micro, times, processes), given in RECIPES:
        arguments = ", ".join(f"{name}={value}" for name, value in given.items())
        what = f"scaled_recipe({micro}, {times}, {processes}, {arguments})"
        got = candidate(micro, times, processes, **given)
        if not isinstance(got, (tuple, list)) or len(got) != 3:
            raise Failed(f"{what} is {got!r}, expected three numbers: batch, learning rate, steps")
        got = [_whole(value) for value in got]
        batch, rate, steps = configs.scaled_recipe(micro, times, processes, **given)
        if any(map(partial(_alike, got), list(permutations((batch, rate, steps)))[1:])):
            raise Failed(
                f"{what} is the wrong way round: {tuple(got)}, expected batch, learning rate, steps"
            )
        batches = {
            "leaves out the processes: the gradients of all go into one step": micro * times,
            "leaves out the micro batches that are accumulated before a step": micro * processes,
            "is the micro batch alone; one step is made of many": micro,
            "adds what must be multiplied": micro + times + processes,
            "adds micro batches and processes, expected their product": micro * (times + processes),
            "leaves out the size of a micro batch; count images": times * processes,
            "divides by the accumulation: more micro batches make more images a step": (
                micro * processes // times
            ),
        }
        refuse_mistakes(got[0], batch, batches, f"the effective batch of {what}")
        equal(got[0], batch, f"the effective batch of {what}")
        blr, images, epochs = given.get("blr", 1e-4), given["images"], given["epochs"]
        if isinstance(got[1], torch.Tensor) or not isinstance(got[1], Real):
            raise Failed(
                f"the learning rate of {what} is of type {type(got[1]).__name__}, expected a number"
            )
        rates = {
            "follows from a base rate of 1e-4 whatever `blr` says": 1e-4 * batch / 256,
            "is the base rate; it belongs to 256 images and grows with the batch": blr,
            "is not divided by 256, the batch that the base rate belongs to": blr * batch,
            "falls with the batch: a larger batch takes larger steps": blr * 256 / batch,
            "grows with the root of the batch; the recipe's grows in proportion": (
                blr * (batch / 256) ** 0.5
            ),
            "belongs to the micro batch, expected the effective batch": blr * micro / 256,
            "belongs to the batch of one process, expected that of all": blr * micro * times / 256,
            "leaves out the accumulation; its images count too": blr * micro * processes / 256,
            "is divided by the accumulation: the mean over micro batches is taken in the loss": (
                blr * batch / 256 / times
            ),
            "takes 2048 for the batch that the base rate belongs to; it is 256": blr * batch / 2048,
            "takes whole multiples of 256 alone (`//`); divide by `/`": blr * (batch // 256),
        }
        _refuse_rates(float(got[1]), rate, rates, f"the learning rate of {what}")
        seen = int(epochs * images)
        counts = {
            "is rounded up: a last step that would not be whole is left out": -(-seen // batch),
            "leaves out the rest of each epoch; batches run on over its end": (
                int(epochs * (images // batch))
            ),
            "is that of one epoch": images // batch,
            "counts micro batches: a step is made when all are added up": seen // micro,
            "is that of one process by itself; together they are faster": seen // (micro * times),
            "leaves out the accumulation: that many micro batches make one step": (
                seen // (micro * processes)
            ),
            "counts images, expected steps": seen,
            "counts steps of 256 images; that is the base batch, not yours": seen // 256,
            "takes whole epochs alone": int(epochs) * images // batch,
        }
        if isinstance(got[2], float) and int(got[2]) == steps:
            raise Failed(f"the steps of {what} are {got[2]}, a float; expected {steps} (int)")
        refuse_mistakes(got[2], steps, counts, f"the number of steps of {what}")
        equal(got[2], steps, f"the number of steps of {what}")


def _alike(got: Sequence, want: Sequence) -> bool:
    return all(isinstance(x, Real) and math.isclose(x, y) for x, y in zip(got, want, strict=True))


def _refuse_rates(got: float, want: float, mistakes: dict[str, float], what: str) -> None:
    for idea, value in mistakes.items():
        if math.isclose(got, value, rel_tol=1e-6) and not math.isclose(value, want, rel_tol=1e-6):
            raise Failed(f"{what} {idea}")
    close(got, want, what, rtol=1e-6, atol=0.0)
