"""What `mar-mini info` says about a preset: its parts, and what training and sampling take."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from mar_mini.configs import Config, get_config
from mar_mini.planner import memory as planning
from mar_mini.planner import work as costs
from mar_mini.transformer import Block


@dataclass(frozen=True)
class Rates:
    """FLOPs of products and bytes moved in a second; seconds to start an operation."""

    flops: float
    bytes: float
    start: float = 0.0

    def seconds(self, work: costs.Work) -> float:
        """Products take the longer of what they compute and what they move; the rest moves."""
        products = np.maximum(work.flops / self.flops, work.product_bytes / self.bytes)
        others = work.other_bytes / self.bytes + work.operations * self.start
        return float(np.sum(products + others))


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
    # operations write into memory that is there already, or is new and has to be made
    copied = (median(lambda: target.copy_(source)) + median(lambda: source + 1)) / 2
    _, work = costs.Counter().run(lambda: tiny.to("meta")(x.to("meta")))
    return Rates(
        2 * 1024**3 / median(lambda: a @ b), 2 * source.nbytes / copied, start / work.operations
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


def tree(config: Config) -> Iterator[str]:
    """Parameters by model and part, and what each is made of."""
    mar, vae, found, heads = (
        config.mar,
        config.vae,
        planning.parts(config),
        "{} blocks, width {}, {} heads",
    )
    if mar:
        model, depths = costs.empty(mar), (mar.encoder_depth, mar.decoder_depth)
        widths = (mar.encoder_embed_dim, mar.decoder_embed_dim)
        both = (mar.encoder_num_heads, mar.decoder_num_heads)
        encoder, decoder = map(heads.format, depths, widths, both)
        yield from branch(
            "MAR",
            found["mar"],
            encoder,
            f"{decoder}; from the encoder's width to its own",
            f"{mar.diffloss_d} blocks, width {mar.diffloss_w}",
            f"{mar.class_num} classes, {mar.buffer_size} buffer tokens, {model.seq_len} tokens of "
            f"{model.token_embed_dim} values",
        )
    if vae:
        widths, blocks = ", ".join(str(vae.ch * mult) for mult in vae.ch_mult), vae.num_res_blocks
        yield from branch(
            "AutoencoderKL",
            found["autoencoder"],
            f"widths {widths}; {blocks} residual blocks each",
            f"the same backwards, {blocks + 1} residual blocks each",
            f"{vae.z_channels} channels, a {2 ** (len(vae.ch_mult) - 1)}th of a side"
            f"{'; the linear path' if vae.linear_path else ''}",
        )


def branch(name: str, found: dict[str, int], *notes: str) -> Iterator[str]:
    yield f"  {name:<16}{sum(found.values()):>14,}"
    for (part, number), note in zip(found.items(), notes, strict=True):
        yield f"    {part:<14}{number:>14,}   {note}"


def amounts(work: dict[str, costs.Work], rates: Rates | None) -> Iterator[str]:
    """FLOPs by part, and seconds where the rates are known."""
    rows = {name: [name] for name in work} | {"together": list(work)}
    for row, names in rows.items():
        flops = costs.total_flops({name: work[name] for name in names})
        took = f"{sum(rates.seconds(work[name]) for name in names):>14.3f} s" if rates else ""
        yield f"  {row:<14}{si(flops) + 'FLOP' if flops else '-':>14}{took}"


def describe(
    config: Config,
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
    dtype, gpu  of the products whose times are told; whether attention is fused in training
    given       settings of sampling that are not the preset's

    Raises ValueError for a batch or a number of steps that cannot be.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected 1 or more")
    mar, vae = config.mar, config.vae
    yield f"{config.name}: parameters"
    yield from tree(config)
    if not mar:
        yield f"\nautoencoder, {batch_size} images of {vae.resolution}x{vae.resolution}"
        yield from amounts(costs.autoencoder_work(vae, batch_size, vae.resolution, dtype)[0], rates)
        return

    def fitting(name: str, need: dict[str, float], train: bool = False) -> str:
        """One way to do it: its memory, and the batch that fits; the preset's in micro batches."""
        line = f"  {name:<34}{si(sum(need.values())) + 'B':>7}"
        if memory:
            most = planning.largest_batch(need, batch_size, memory)
            line += f", batch {most} fits in {si(memory)}B"
            micro, times = planning.divide(config.training.batch_size, most) if train else (0, 0)
            line += f" ({micro * times} as {times} x {micro})" if micro else ""
        return f"{line}: {', '.join(f'{kind} {si(n)}B' for kind, n in need.items() if n)}"

    tokens = costs.empty(mar).seq_len
    masked = tokens * planning.mean_mask_ratio(mar.mask_ratio_min)
    yield f"\na training step, {batch_size} images ({masked:.0f} of {tokens} tokens masked)"
    yield from amounts(costs.training_work(mar, batch_size, dtype=dtype), rates)
    for name, kind in (("float32", "float32"), ("bfloat16 autocast", "bfloat16")):
        for less in (False, True):
            way = replace(mar, grad_checkpointing=less)
            need = planning.training_memory(way, batch_size, None, kind, gpu)
            yield fitting(name + ", checkpointing" * less, need, True)

    settings = planning.sampling_settings(config, given)
    guidance = f"guidance {settings.cfg:g}" if settings.cfg != 1 else "no guidance"
    yield (
        f"\nsampling, {batch_size} images ({settings.num_iter} iterations, "
        f"{settings.num_sampling_steps} diffusion steps, {guidance})"
    )
    yield from amounts(costs.sampling_work(config, batch_size, settings, dtype), rates)
    for kind in ("float32", "bfloat16"):
        yield fitting(kind, planning.sampling_memory(config, batch_size, settings, kind))


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

    No memory is taken and nothing is computed: its operations are counted.

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
    memory = memory_gb and memory_gb * 1e9 or (planning.available_memory() if here else None)
    given = {"num_iter": num_iter, "num_sampling_steps": num_sampling_steps, "cfg": cfg}
    print("\n".join(describe(config, batch_size, rates, memory, dtype, not here, **given)))
    return 0
