"""How long work takes on a device: its rates, given or measured."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mar_mini.planner.work import Work, block
from mar_mini.transformer import Block


@dataclass(frozen=True)
class Rates:
    """What a device does in a second, as far as it can be told in three numbers.

    flops  FLOPs of matrix products in a second
    bytes  read and written in a second
    start  seconds that it takes to start one operation
    """

    flops: float
    bytes: float
    start: float = 0.0

    def seconds(self, work: Work) -> float:
        """Products take the longer of what they compute and what they move; the rest moves."""
        products = max(work.flops / self.flops, work.product_bytes / self.bytes)
        return products + work.other_bytes / self.bytes + work.operations * self.start

    def by_part(self, phases: list[tuple[str, Work]]) -> dict[str, float]:
        """Seconds of each part, in the order in which they first come."""
        seconds = dict.fromkeys((name for name, _ in phases), 0.0)
        for name, work in phases:
            seconds[name] += self.seconds(work)
        return seconds


@torch.no_grad()
def measure_rates(
    dtype: torch.dtype = torch.float32, clock: Callable[[], float] = time.perf_counter
) -> Rates:
    """This machine's rates for one large product, one large copy and a tiny block; about a second.

    clock  what tells the seconds; on a busy machine, with one thread, time.process_time
    """
    n, dim = 1024, 8
    a, b = (torch.randn(n, n, dtype=dtype) for _ in range(2))
    source = torch.zeros(2**24)  # 64 MiB
    target = torch.empty_like(source)
    tiny, x = Block(dim, 1).eval(), torch.randn(1, 2, dim)

    def median(function: Callable[[], object], times: int) -> float:
        seconds = []
        function()
        for _ in range(times):
            begin = clock()
            function()
            seconds.append(clock() - begin)
        return statistics.median(seconds)

    start = median(lambda: [tiny(x) for _ in range(50)], 9) / 50
    return Rates(
        flops=2 * n**3 / median(lambda: a @ b, 15),
        bytes=2 * 4 * source.numel() / median(lambda: target.copy_(source), 15),
        start=start / block(1, 2, dim, 4 * dim, 4).operations,
    )


def device_rates(
    tflops: float | None,
    gb_per_s: float | None,
    us_per_operation: float,
    here: bool,
    dtype: torch.dtype = torch.float32,
) -> Rates | None:
    """The rates of a device as they were given, or of this one measured; None if neither.

    Raises ValueError if numbers are missing, not above 0, or given and asked to be measured too.
    """
    for name, value in (("tflops", tflops), ("gb-per-s", gb_per_s)):
        if value is not None and value <= 0:
            raise ValueError(f"{name} is {value}; expected more than 0")
    if us_per_operation < 0:
        raise ValueError(f"us-per-operation is {us_per_operation}; expected 0 or more")
    if here:
        if tflops is not None or gb_per_s is not None:
            raise ValueError("--here measures the rates; leave out --tflops and --gb-per-s, or it")
        return measure_rates(dtype)
    if (tflops is None) != (gb_per_s is None):
        raise ValueError("times need both --tflops and --gb-per-s; give the other one too, or none")
    if tflops is None or gb_per_s is None:
        return None
    return Rates(tflops * 1e12, gb_per_s * 1e9, us_per_operation * 1e-6)
