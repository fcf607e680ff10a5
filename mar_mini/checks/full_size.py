"""Checks of chapter 10: parameters of a block, a plan that fits, the effective batch."""

import math

import torch

from mar_mini import configs, planning
from mar_mini.checks import Failed, close, equal, exercise, refuse_mistakes


@exercise(reference=planning.block_parameters)
def block_parameters(candidate):
    for d, ratio in ((6, 4.0), (10, 2.5), (7, 1.5), (768, 4.0)):
        what, h = f"block_parameters({d}, {ratio})", int(d * ratio)
        want, got = planning.block_parameters(d, ratio), candidate(d, ratio)
        if isinstance(got, torch.Tensor):
            raise Failed(f"{what} is a tensor, expected {want} (int): sizes alone are needed")
        if isinstance(got, float) and got == want:
            raise Failed(f"{what} is {got}, a float; the hidden layer has int(dim * mlp_ratio) "
                         "values, a whole number")  # fmt: skip
        mistakes = {
            "counts matrices alone, 12 D^2 at the usual ratio; each linear layer has biases too, "
            "and there are two norms": want - h - 9 * d,
            "counts no biases of the linear layers": want - h - 5 * d,
            "leaves out the norms: there are two, each with a scale and a shift": want - 4 * d,
            "counts 2 D for the norms: there are two of them, each with a scale and a shift": (
                want - 2 * d
            ),
            "has one matrix for queries, keys and values; `qkv` makes three vectors of D": (
                want - 2 * d * d - 2 * d
            ),
            "leaves out the biases of `qkv`": want - 3 * d,
            "counts D biases for `qkv`, expected 3 D: one for each number that comes out": (
                want - 2 * d
            ),
            "leaves out `proj`, the layer that mixes what the heads found": want - d * d - d,
            "leaves out the biases of `proj`": want - d,
            "leaves out the attention": want - 4 * d * d - 4 * d,
            "leaves out the MLP": want - 2 * d * h - h - d,
            "counts one layer of the MLP; it goes to the hidden layer and back": want - d * h - d,
            "counts the MLP's first layer twice; the second one's biases are D": want + h - d,
            "leaves out the biases of the MLP": want - h - d,
            "takes the hidden layer to be as wide as D": 6 * d * d + 10 * d,
            "takes the hidden layer to be 4 D whatever `mlp_ratio` says": 12 * d * d + 13 * d,
            "counts FLOPs of a row, two for each weight": 8 * d * d + 4 * d * h,
            "is in bytes; count the numbers": 4 * want,
        }
        refuse_mistakes(got, want, mistakes, what)
        equal(got, want, what)


# parameters, bytes an image, GB, batch, processes: any number up to 12 divides 27,720
RUNS = [
    (250_000_000, 9.8e7, 6.0, 27_720, 1), (250_000_000, 9.8e7, 6.0, 83_160, 3),
    (10_000_000, 1e7, 1.0, 2048, 1), (30_000_000, 2.3e7, 2.0, 960, 3),
    (10_000_000, 1e7, 4.0, 96, 4), (12_000_000, 1e7, 0.5, 630, 2),
    (10_000_000, 1e7, 0.2299, 2048, 1),
]  # fmt: skip


def _fit(most: float, share: int) -> tuple[int, int]:
    """The largest divisor of a share that is at most that, and how often it goes into the share."""
    micro = max((n for n in range(1, share + 1) if share % n == 0 and n <= most), default=0)
    return (micro, share // micro) if micro else (0, 0)


@exercise(reference=planning.plan_run)
def plan_run(candidate):
    for count, image, memory, batch, processes in RUNS:
        what = f"plan_run({count:,}, {image:g}, {memory:g}, {batch}, {processes})"
        want = planning.plan_run(count, image, memory, batch, processes)
        try:
            got = candidate(count, image, memory, batch, processes)
        except (ValueError, ZeroDivisionError) as error:
            if want == (0, 0):
                error.args = (f"{what}: no image fits, expected (0, 0) ({error})",)
            raise
        got = tuple(got) if isinstance(got, list) else got
        share = batch // processes

        def fitted(state=22 * count, gb=1e9, all_=share, image=image, memory=memory):
            return _fit((gb * memory - state) / image, all_)

        most = math.floor((1e9 * memory - 22 * count) / image)
        mistakes = {
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
            "leaves out the bfloat16 copies of the weights, 2 bytes a parameter": (
                fitted(20 * count)
            ),
            "takes a GB for 2^30 bytes, which are a GiB; here it is 10^9": fitted(gb=2**30),
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
            "divides the number of micro batches by the processes once more": (
                (want[0], want[1] // processes)
            ),
            "has a micro batch that does not divide the process's share: the rest of its images "
            "would be lost": (min(most, share), share // max(min(most, share), 1)),
            "has a micro batch that does not divide the process's share; the last one would be "
            "smaller": (min(most, share), -(-share // max(min(most, share), 1))),
            "takes powers of two alone; any divisor of the share will do": (
                _powers(most, share)
            ),
            "takes the smallest micro batch; the largest that fits is the fastest": (1, share),
        }
        refuse_mistakes(got, want, mistakes, what)
        equal(got, want, what)


def _powers(most: int, share: int) -> tuple[int, int]:
    powers = [2**k for k in range(20) if 2**k <= most and share % 2**k == 0]
    return (powers[-1], share // powers[-1]) if powers else (0, 0)


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
        batch, rate, steps = configs.scaled_recipe(micro, times, processes, **given)
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
        if isinstance(got[1], torch.Tensor) or not isinstance(got[1], (int, float)):
            raise Failed(f"the learning rate of {what} is of type {type(got[1]).__name__}, "
                         "expected a number")  # fmt: skip
        rates = {
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


def _refuse_rates(got: float, want: float, mistakes: dict[str, float], what: str) -> None:
    for idea, value in mistakes.items():
        if math.isclose(got, value, rel_tol=1e-6) and not math.isclose(value, want, rel_tol=1e-6):
            raise Failed(f"{what} {idea}")
    close(got, want, what, rtol=1e-6, atol=0.0)
