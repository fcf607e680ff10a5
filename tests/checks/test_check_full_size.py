"""The checks of chapter 10 refuse plausible mistakes, each by the name of its idea."""

import math
import operator

import numpy as np
import pytest
import torch

from mar_mini import configs, transformer
from mar_mini.checks import Failed
from mar_mini.checks import full_size as check
from mar_mini.planner import memory as planning


@pytest.fixture(autouse=True)
def strict(monkeypatch):
    monkeypatch.setenv("MAR_MINI_STRICT", "1")


def linear(a, b):
    return (a + 1) * b


def block(d, ratio=4.0):
    h = int(d * ratio)
    return linear(d, 3 * d) + linear(d, d) + linear(d, h) + linear(h, d) + 4 * d


def matrices(d, ratio=4.0):
    return 4 * d * d + 2 * d * int(d * ratio)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (matrices, "matrices alone"),
        (lambda d, r: matrices(d, r) + 4 * d, "no biases of the linear layers"),
        (lambda d, r: block(d, r) - 4 * d, "leaves out the norms, or the biases of `qkv` and `pr"),
        (lambda d, r: block(d, r) - 2 * d, "2 D for the norms, expected 4 D"),
        (lambda d, r: block(d, r) - linear(d, 3 * d) + linear(d, d), "one matrix for queries"),
        (lambda d, r: block(d, r) - 3 * d, "biases of `qkv`"),
        (lambda d, r: block(d, r) - linear(d, d), "leaves out `proj`"),
        (lambda d, r: block(d, r) - d, "biases of `proj`, or those of `fc2`"),
        (lambda d, r: block(d, r) - int(d * r), "leaves out the biases of `fc1`"),
        (lambda d, r: block(d, r) - int(d * r) + d, "counts D biases for `fc1`"),
        (lambda d, r: block(d, r) - linear(d, int(d * r)), "second layer of the MLP alone"),
        (lambda d, r: block(d, round(d * r) / d), "rounds the width of the hidden layer"),
        (lambda d, r: block(d, math.ceil(d * r) / d), "rounds the width of the hidden layer"),
        (lambda d, r: int(4 * d * d + 9 * d + (2 * d + 1) * d * r), "cuts off at the end"),
        (lambda d, r: block(d, r) - 4 * linear(d, d), "leaves out the attention"),
        (lambda d, r: block(d, r) - linear(d, int(d * r)) - linear(int(d * r), d), "out the MLP"),
        (lambda d, r: block(d, r) - linear(int(d * r), d), "one layer of the MLP"),
        (lambda d, r: block(d, r) - d + int(d * r), "the second one's biases are D"),
        (lambda d, r: block(d, r) - int(d * r) - d, "biases of the MLP"),
        (lambda d, r: block(d, 1.0), "as wide as D"),
        (lambda d, r: block(d), "whatever `mlp_ratio` says"),
        (lambda d, r: 12 * d * d, r"is 432, expected 393"),
        (lambda d, r: 2 * matrices(d, r), "counts FLOPs of a row"),
        (lambda d, r: 4 * block(d, r), "in bytes"),
        (lambda d, r: float(block(d, r)), "a whole number"),
        (lambda d, r: torch.tensor(block(d, r)), "is a tensor"),
        (lambda d, r: block(d, r) + 1, r"is 394, expected 393"),
    ],
)
def test_block_parameters(wrong, message):
    with pytest.raises(Failed, match=message):
        check.block_parameters(wrong)


def divisor(most, share):
    return max((n for n in range(1, share + 1) if share % n == 0 and n <= most), default=0)


def planned(state=22, gb=1e9, whole=False, together=False):
    """A plan with so many bytes of state a parameter, and of a GB."""

    def plan(count, image, memory_gb, batch, processes=1):
        share = batch if whole else batch // processes
        micro = divisor((gb * memory_gb - state * count) / image, share)
        return (micro, (batch if together else share) // micro) if micro else (0, 0)

    return plan


def apart(count, image, memory_gb, batch, processes=1):
    """Memory and state each in whole images."""
    share = batch // processes
    micro = divisor(1e9 * memory_gb // image - 22 * count // image, share)
    return (micro, share // micro) if micro else (0, 0)


def not_all(count, image, memory_gb, batch, processes=1):
    micro, times = planned()(count, image, memory_gb, batch, processes)
    return micro, max(0, times - 1)


def once(count, image, memory_gb, batch, processes=1):
    fits = 1e9 * memory_gb - 22 * count >= image
    return (batch // processes, 1) if fits else (0, 0)


def shared_state(count, image, memory_gb, batch, processes=1):
    return planned()(count / processes, image, memory_gb, batch, processes)


def any_size(rounding):
    def plan(count, image, memory_gb, batch, processes=1):
        share = batch // processes
        micro = min(share, int((1e9 * memory_gb - 22 * count) // image))
        return (micro, rounding(share / micro)) if micro > 0 else (0, 0)

    return plan


def halved(count, image, memory_gb, batch, processes=1):
    """Halves the batch until it fits: finds powers of two times an odd number alone."""
    micro = batch // processes
    while micro > 1 and (micro % 2 or micro * image > 1e9 * memory_gb - 22 * count):
        micro //= 2
    return micro, batch // processes // micro


def powers(count, image, memory_gb, batch, processes=1):
    share, micro = batch // processes, 1
    if image > 1e9 * memory_gb - 22 * count:
        return 0, 0
    while share % (2 * micro) == 0 and 2 * micro * image <= 1e9 * memory_gb - 22 * count:
        micro *= 2
    return micro, share // micro


def stops(count, image, memory_gb, batch, processes=1):
    micro, times = planned()(count, image, memory_gb, batch, processes)
    if not micro:
        raise ValueError("too large")
    return micro, times


def sizes(keep, free=lambda x: x, fits=operator.le):
    """A plan with the micro batches that `keep` lets pass, of a share."""

    def plan(count, image, memory_gb, batch, processes=1):
        share, left = batch // processes, free(1e9 * memory_gb - 22 * count)
        found = [n for n in range(1, share + 1) if share % n == 0 and keep(n, share)]
        micro = max((n for n in found if fits(n * image, left)), default=0)
        return (micro, share // micro) if micro else (0, 0)

    return plan


def how_many(number):
    """A plan with `number(free, image)` images at most."""

    def plan(count, image, memory_gb, batch, processes=1):
        share = batch // processes
        micro = divisor(number(1e9 * memory_gb - 22 * count, image), share)
        return (micro, share // micro) if micro else (0, 0)

    return plan


ACCOUNT = r"expected \(5, 5544\): state is 22 bytes a parameter, 5.5 of the 6 GB"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (sizes(lambda n, _: True, free=abs), r"1,000,000,000.*state alone overflows"),
        (sizes(lambda n, _: n > 1), "leaves out a micro batch of one image"),
        (sizes(lambda n, _: True, fits=operator.lt), "fits to the byte"),
        (sizes(lambda n, share: n < share), "whole share as a single micro batch"),
        (sizes(lambda n, _: n % 2 == 0 or n == 1), ACCOUNT),
        (how_many(lambda free, image: round(free / image)), "rounds how many images fit"),
        (how_many(lambda free, image: free // image - 1), "one image too few"),
        (apart, "subtract the state, then divide"),
        (not_all, "5 times 5543 images, but the process computes 27720"),
        (how_many(lambda free, image: free // (22 * image)), ACCOUNT),
        (lambda c, i, m, b, p: planned(state=0)(c, i + 22 * c, m, b, p), "state for each image"),
        (planned(gb=9e8), "keeps a tenth of the memory back"),
        *[(planned(state=n), ACCOUNT) for n in (2, 12, 24, 26)],
        *[(planned(state=n), "state is 22 bytes a parameter") for n in (21, 23)],
        (lambda *a: (1, a[3] // a[4]), "where nothing fits, too"),
        (planned(state=0), "leaves out the state"),
        (planned(state=4), "weights alone as state"),
        (planned(state=8), "weights and gradients alone"),
        (planned(state=14), "what AdamW keeps"),
        (planned(state=16), "both the average and the copies"),
        (planned(state=18), "leaves out 4 bytes of state"),
        (planned(state=20), "leaves out the bfloat16 copies"),
        (planned(gb=2**30), "which are a GiB"),
        (planned(gb=1), "takes the memory for bytes"),
        (once, "for one image only"),
        (shared_state, "shares out the state"),
        (planned(whole=True), "micro batches of the whole batch"),
        (planned(together=True), "counts the micro batches of the whole batch"),
        (any_size(math.floor), "rest of its images would be lost"),
        (any_size(math.ceil), "the last one would be smaller"),
        (powers, "powers of two alone"),
        (lambda *a: planned()(*a)[::-1], "wrong way round"),
        (sizes(lambda n, _: n == 1), "smallest micro batch; the largest"),
        (lambda c, i, m, b, p: planned()(c, i, m / p, b, p), "shares out the memory"),
        (lambda c, i, m, b, p: planned()(c, i, m * p, b, p), "adds up memory"),
        (stops, r"no image fits, expected \(0, 0\)"),
        (lambda *a: float(planned()(*a)[0]), "is of type float"),
        (halved, r"plan_run\(250,000,000, 9.8e\+07, 6, 27720, 1\)"),
    ],
)
def test_plan_run(wrong, message):
    with pytest.raises(Failed, match=message):
        check.plan_run(wrong)


def test_a_mistake_in_a_plan_that_hardly_shows():
    """Without the copies most plans are the same; the check has one that is not."""
    right, wrong = planned(), planned(state=20)
    same = [right(*run) == wrong(*run) for run in check.RUNS]
    assert sum(same) >= 3 and not all(same)


def recipe(micro, times, processes, *, images, epochs, blr=1e-4, batch=None, rate=None, steps=None):
    size = micro * times * processes
    return (
        size if batch is None else batch,
        blr * size / 256 if rate is None else rate,
        int(epochs * images) // size if steps is None else steps,
    )


def of_batch(change):
    return lambda m, a, p, **given: recipe(m, a, p, **given, batch=change(m, a, p))


def of_rate(change):
    def wrong(m, a, p, *, images, epochs, blr=1e-4):
        given = {"images": images, "epochs": epochs, "blr": blr}
        return recipe(m, a, p, **given, rate=change(m, a, p, blr))

    return wrong


def of_steps(change):
    def wrong(m, a, p, *, images, epochs, blr=1e-4):
        given = {"images": images, "epochs": epochs, "blr": blr}
        return recipe(m, a, p, **given, steps=change(images, epochs, m, a, p))

    return wrong


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (of_batch(lambda m, a, p: m * a), "leaves out the processes"),
        (of_batch(lambda m, a, p: m * p), "leaves out the micro batches"),
        (of_batch(lambda m, a, p: m), "is the micro batch alone"),
        (of_batch(lambda m, a, p: m + a + p), "adds what must be multiplied"),
        (of_batch(lambda m, a, p: m * (a + p)), "adds micro batches and processes"),
        (of_batch(lambda m, a, p: a * p), "leaves out the size"),
        (of_batch(lambda m, a, p: m * p // a), "divides by the accumulation"),
        (of_rate(lambda m, a, p, blr: blr), "is the base rate"),
        (of_rate(lambda m, a, p, blr: blr * m * a * p), "not divided by 256"),
        (of_rate(lambda m, a, p, blr: blr * 256 / (m * a * p)), "falls with the batch"),
        (of_rate(lambda m, a, p, blr: blr * math.sqrt(m * a * p / 256)), "root of the batch"),
        (of_rate(lambda m, a, p, blr: blr * m / 256), "belongs to the micro batch"),
        (of_rate(lambda m, a, p, blr: blr * m * a / 256), "batch of one process"),
        (of_rate(lambda m, a, p, blr: blr * m * p / 256), "(leaves out|divided by) the accumul"),
        (of_rate(lambda m, a, p, blr: blr * m * a * p / 2048), "takes 2048"),
        (of_rate(lambda m, a, p, blr: blr * (m * a * p // 256)), "whole multiples of 256"),
        (of_rate(lambda m, a, p, blr: torch.tensor(blr)), "is of type Tensor, expected a number"),
        (of_rate(lambda m, a, p, blr: 1.0), "is 1, expected 0.000164"),
        (of_steps(lambda n, e, m, a, p: -(-int(e * n) // (m * a * p))), "is rounded up"),
        (of_steps(lambda n, e, m, a, p: int(e * (n // (m * a * p)))), "the rest of each epoch"),
        (of_steps(lambda n, e, m, a, p: n // (m * a * p)), "is that of one epoch"),
        (of_steps(lambda n, e, m, a, p: int(e * n) // m), "counts micro batches"),
        (of_steps(lambda n, e, m, a, p: int(e * n) // (m * a)), "one process by itself"),
        (of_steps(lambda n, e, m, a, p: int(e * n) // (m * p)), "leaves out the accumulation"),
        (of_steps(lambda n, e, m, a, p: int(e * n)), "counts images"),
        (of_steps(lambda n, e, m, a, p: int(e * n) // 256), "steps of 256 images"),
        (of_steps(lambda n, e, m, a, p: int(e) * n // (m * a * p)), "whole epochs alone"),
        (of_steps(lambda n, e, m, a, p: e * n // (m * a * p) * 1.0), "a float; expected"),
        (lambda m, a, p, **given: recipe(m, a, p, **given)[1], "expected three numbers"),
        (lambda m, a, p, **given: recipe(m, a, p, **given)[::-1], "wrong way round"),
        (of_rate(lambda m, a, p, blr: 1e-4 * m * a * p / 256), "whatever `blr` says"),
    ],
)
def test_scaled_recipe(wrong, message):
    with pytest.raises(Failed, match=message):
        check.scaled_recipe(wrong)


def test_right_solutions_pass():
    def built(dim, mlp_ratio=4.0):
        with torch.device("meta"):
            return sum(p.numel() for p in transformer.Block(dim, 1, mlp_ratio).parameters())

    def by_loop(count, image, memory_gb, batch, processes=1):
        share, free = batch // processes, 1e9 * memory_gb - 22 * count
        for times in range(1, share + 1):
            if share % times == 0 and share // times * image <= free:
                return [share // times, times]
        return [0, 0]

    def seen(micro_batch, accumulate, processes, *, images, epochs, blr=1e-4):
        batch = micro_batch * accumulate * processes
        return batch, batch / 256 * blr, int(images * epochs / batch)

    assert check.block_parameters(block) is block
    assert check.block_parameters(built) is built
    assert check.plan_run(planned()).__name__ == "plan"
    assert check.plan_run(by_loop) is by_loop
    assert check.scaled_recipe(seen) is seen
    assert check.block_parameters(planning.block_parameters) is planning.block_parameters
    assert check.plan_run(planning.plan_run) is planning.plan_run
    assert check.scaled_recipe(configs.scaled_recipe) is configs.scaled_recipe


def test_numbers_of_numpy_are_numbers():
    def count(dim, mlp_ratio=4.0):
        return np.int64(block(dim, mlp_ratio))

    def plan(*run):
        return tuple(map(np.int64, planned()(*run)))

    def three(*sizes, images, epochs, blr=1e-4):
        batch = np.prod(sizes)
        return batch, np.float32(blr * batch / 256), np.int64(epochs * images) // batch

    assert check.block_parameters(count) is count
    assert check.plan_run(plan) is plan
    assert check.scaled_recipe(three) is three


def test_what_is_not_written_is_handed_on(monkeypatch, capsys):
    def unwritten(*_, **__):
        raise NotImplementedError

    monkeypatch.delenv("MAR_MINI_STRICT")
    assert check.block_parameters(unwritten) is planning.block_parameters
    assert check.plan_run(unwritten) is planning.plan_run
    assert check.scaled_recipe(unwritten) is configs.scaled_recipe
    assert capsys.readouterr().out.count("not written yet") == 3
