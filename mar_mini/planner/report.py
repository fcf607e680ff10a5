"""What `mar-mini info` says about a preset: its parts, and what training and sampling take."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from mar_mini.configs import Config, get_config
from mar_mini.planner import memory as planning
from mar_mini.planner.work import (
    Counter,
    Work,
    autoencoder_work,
    empty,
    meta,
    total_flops,
    training_work,
)
from mar_mini.transformer import Block


@dataclass(frozen=True)
class Rates:
    """What a device does in a second: FLOPs of products, bytes read and written; seconds to start
    an operation.
    """

    flops: float
    bytes: float
    start: float = 0.0

    def seconds(self, work: Work) -> float:
        """Products take the longer of what they compute and what they move; the rest moves."""
        products = np.maximum(work.flops / self.flops, work.product_bytes / self.bytes)
        return float(
            np.sum(products + work.other_bytes / self.bytes + work.operations * self.start)
        )


@torch.no_grad()
def measure_rates(dtype: str = "float32", clock: Callable[[], float] = time.perf_counter) -> Rates:
    """This machine's rates for one large product, one large copy and a tiny block; about a second.

    clock  what tells the seconds; on a busy machine, with one thread, time.process_time
    """
    a, b = (torch.randn(1024, 1024).to(getattr(torch, dtype)) for _ in range(2))
    source, target = torch.zeros(2**24), torch.zeros(2**24)  # 64 MiB
    tiny, x = Block(8, 1).eval(), torch.randn(1, 2, 8)

    def median(function: Callable[[], object], times: int = 15) -> float:
        seconds = []
        for _ in range(times + 1):  # the first one warms up
            begin = clock()
            function()
            seconds.append(clock() - begin)
        return statistics.median(seconds[1:])

    start = median(lambda: [tiny(x) for _ in range(50)], 9) / 50
    operations = Counter().run(lambda: tiny.to("meta")(meta(1, 2, 8)))[1].operations
    copied = median(lambda: target.copy_(source))
    return Rates(
        2 * 1024**3 / median(lambda: a @ b), 2 * source.nbytes / copied, start / operations
    )


def device_rates(
    tflops: float | None,
    gb_per_s: float | None,
    us_per_operation: float,
    here: bool,
    dtype="float32",
) -> Rates | None:
    """The rates of a device as they were given, or of this one measured; None if neither.

    Raises ValueError if numbers are missing, not above 0, or given and asked to be measured too.
    """
    for name, value in (("tflops", tflops), ("gb-per-s", gb_per_s)):
        if value is not None and value <= 0:
            raise ValueError(f"{name} is {value}; expected more than 0")
    if us_per_operation < 0:
        raise ValueError(f"us-per-operation is {us_per_operation}; expected 0 or more")
    if here and (tflops or gb_per_s):
        raise ValueError("--here measures the rates; leave out --tflops and --gb-per-s, or it")
    if (tflops is None) != (gb_per_s is None):
        raise ValueError("times need both --tflops and --gb-per-s; give the other one too, or none")
    if tflops and gb_per_s:
        return Rates(tflops * 1e12, gb_per_s * 1e9, us_per_operation * 1e-6)
    return measure_rates(dtype) if here else None


def si(number: float) -> str:
    """Three digits and a prefix: 1.32 T."""
    power = 0
    while number >= 999.5:
        number, power = number / 1000, power + 1
    digits = 0 if number >= 99.95 else 1 if number >= 9.995 else 2
    return f"{number:.{digits}f} {' kMGTPEZ'[power].strip()}"


def amounts(work: dict[str, Work], rates: Rates | None) -> Iterator[str]:
    """FLOPs by part, and seconds where the rates are known."""
    rows = {
        name: (total_flops({"": part}), rates and rates.seconds(part))
        for name, part in work.items()
    }
    seconds = rates and sum(took for _, took in rows.values())
    for name, (flops, took) in (rows | {"together": (total_flops(work), seconds)}).items():
        took = "" if took is None else f"{took:>14.3f} s"
        yield f"  {name:<14}{si(flops) + 'FLOP' if flops else '-':>14}{took}"


def describe(
    config: Config,
    *,
    batch_size=16,
    rates: Rates | None = None,
    memory: float | None = None,
    dtype="float32",
    gpu=True,
    **given,
) -> Iterator[str]:
    """The report, line by line.

    batch_size  images of a training step on one device, and of one sampling
    rates       of the device, None if no times are asked for
    memory      bytes that the device has, None if nothing is to fit
    dtype       of the products whose times are told, "float32" or "bfloat16"
    gpu         whether the device of the training is one, where attention is fused
    given       settings of `planning.plan_sampling`

    Raises ValueError for a batch or a number of steps that cannot be.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected 1 or more")
    mar, vae, own = config.mar, config.vae, planning.chosen(config, given)
    notes, found = {}, planning.parts(config)
    if mar:
        model, count = empty(mar), planning.parameters(config)
        tokens = model.seq_len
        notes["mar"] = (
            f"{mar.encoder_depth} blocks, width {mar.encoder_embed_dim}, "
            f"{mar.encoder_num_heads} heads",
            f"{mar.decoder_depth} blocks, width {mar.decoder_embed_dim}, "
            f"{mar.decoder_num_heads} heads; from the encoder's width to its own",
            f"{mar.diffloss_d} blocks, width {mar.diffloss_w}",
            f"{mar.class_num} classes, {mar.buffer_size} buffer tokens, {tokens} tokens of "
            f"{model.token_embed_dim} values",
        )
    if vae:
        widths = ", ".join(str(vae.ch * mult) for mult in vae.ch_mult)
        notes["autoencoder"] = (
            f"widths {widths}; {vae.num_res_blocks} residual blocks each",
            f"the same backwards, {vae.num_res_blocks + 1} residual blocks each",
            f"{vae.z_channels} channels, a {2 ** (len(vae.ch_mult) - 1)}th of a side"
            f"{'; the linear path' if vae.linear_path else ''}",
        )
    yield f"{config.name}: parameters"
    for name, sizes in found.items():
        title = {"mar": "MAR", "autoencoder": "AutoencoderKL"}[name]
        yield f"  {title:<16}{sum(sizes.values()):>14,}"
        for (part, number), note in zip(sizes.items(), notes[name], strict=True):
            yield f"    {part:<14}{number:>14,}   {note}"
    if not mar:
        yield f"\nautoencoder, {batch_size} images of {vae.resolution}x{vae.resolution}"
        yield from amounts(autoencoder_work(vae, batch_size, vae.resolution, dtype)[0], rates)
        return

    def fitting(name: str, need: dict[str, float], size: int | None = None) -> str:
        """One way to do it: its memory, and the batch that fits; to train, in micro batches."""
        line = f"  {name:<34}{si(sum(need.values())) + 'B':>7}"
        if memory:
            line += (
                f", batch {planning.largest_batch(need, batch_size, memory)} fits in {si(memory)}B"
            )
        if memory and size:
            image = (need["activations"] + need["at work"]) / batch_size
            whole = config.training.batch_size
            micro, times = planning.plan_run(count, image, memory / 1e9, whole, size=size)
            line += f" ({whole} as {times} x {micro})" if micro else ""
        return f"{line}: {', '.join(f'{kind} {si(n)}B' for kind, n in need.items() if n)}"

    masked = tokens * planning.mean_mask_ratio(mar.mask_ratio_min)
    yield f"\na training step, {batch_size} images ({masked:.0f} of {tokens} tokens masked)"
    yield from amounts(training_work(mar, batch_size, parameters=count, dtype=dtype), rates)
    for name, kind in (("float32", "float32"), ("bfloat16 autocast", "bfloat16")):
        for less in (False, True):
            way = replace(mar, grad_checkpointing=less)
            need = planning.training_memory(way, batch_size, dtype=kind, gpu=gpu)
            yield fitting(name + ", checkpointing" * less, need, getattr(torch, kind).itemsize)

    _, work = planning.plan_sampling(config, batch_size, dtype, float("inf"), **given)
    yield (
        f"\nsampling, {batch_size} images ({own.num_iter} iterations, {own.num_sampling_steps} "
        f"diffusion steps, {f'guidance {own.cfg:g}' if own.cfg != 1 else 'no guidance'})"
    )
    yield from amounts(work, rates)
    for kind in ("float32", "bfloat16"):
        need = planning.sampling_memory(config, batch_size, own.num_iter, own.cfg != 1, kind)
        yield fitting(kind, need)


def info(
    preset: str,
    *,
    batch_size: int = 16,
    num_iter: int | None = None,
    num_sampling_steps: int | None = None,
    cfg: float | None = None,
    tflops: float | None = None,
    gb_per_s: float | None = None,
    us_per_operation: float = 5.0,
    memory_gb: float | None = None,
    here: bool = False,
    bf16: bool = False,
) -> int:
    """Say what a preset is made of, and what memory and time it takes to train and to sample.

    Nothing is trained and no image is made: its operations are counted.

    Args:
        preset: name of the preset.
        batch_size: images of a training step on one device, and of one sampling.
        num_iter: autoregressive steps; this and the next two are the preset's if left out.
        num_sampling_steps: diffusion steps.
        cfg: guidance weight, 1 for none.
        tflops: how many TFLOP/s of matrix products the device reaches; with it come times.
        gb_per_s: how many GB/s it reads and writes.
        us_per_operation: microseconds that it takes to start an operation.
        memory_gb: memory of the device; says which batch fits.
        here: measure these numbers on this machine's CPU first, for a second.
        bf16: times of bfloat16 products instead of float32.
    """
    config, dtype = get_config(preset), "bfloat16" if bf16 else "float32"
    if memory_gb is not None and memory_gb <= 0:
        raise ValueError(f"memory-gb is {memory_gb}; expected more than 0")
    rates = device_rates(tflops, gb_per_s, us_per_operation, here, dtype)
    memory = (
        memory_gb * 1e9 if memory_gb is not None else planning.available_memory() if here else None
    )
    given = {"num_iter": num_iter, "num_sampling_steps": num_sampling_steps, "cfg": cfg}
    use = {
        "batch_size": batch_size,
        "rates": rates,
        "memory": memory,
        "dtype": dtype,
        "gpu": not here,
    }
    print("\n".join(describe(config, **use, **given)))
    return 0
