"""What `mar-mini info` says about a preset: its parts, and what training and sampling take."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from mar_mini.configs import Config, MARConfig, VAEConfig
from mar_mini.planner import memory as planning
from mar_mini.planner import work as costs
from mar_mini.planner.memory import SIZES
from mar_mini.planner.rates import Rates


@dataclass(frozen=True)
class Use:
    """How a preset is to be used; what is None is the preset's own.

    batch_size  images of a training step on one device, and of one sampling
    rates       of the device, None if no times are asked for
    memory      bytes that the device has, None if nothing is to fit
    dtype       of the products whose times are told, "float32" or "bfloat16"
    gpu         whether the device of the training is one, where attention is fused
    """

    batch_size: int = 16
    num_iter: int | None = None
    num_sampling_steps: int | None = None
    cfg: float | None = None
    rates: Rates | None = None
    memory: float | None = None
    dtype: str = "float32"
    gpu: bool = True


def describe(config: Config, use: Use) -> Iterator[str]:
    """The report, line by line.

    Raises ValueError for a batch or a number of steps that cannot be.
    """
    if use.batch_size < 1:
        raise ValueError(f"batch_size is {use.batch_size}; expected 1 or more")
    found = planning.parts(config)
    yield f"{config.name}: parameters"
    if config.mar:
        yield from tree("MAR", found["mar"], mar_parts(config.mar))
    if config.vae:
        yield from tree("AutoencoderKL", found["autoencoder"], vae_parts(config.vae))
    if config.mar:
        yield from training(config, sum(found["mar"].values()), use)
        yield from sampling(config, use)
    else:
        side, size = config.vae.resolution, SIZES[use.dtype]
        yield f"\nautoencoder, {use.batch_size} images of {side}x{side}"
        work = [
            ("encoding", costs.vae_encode(config.vae, use.batch_size, side, size)),
            ("decoding", costs.vae_decode(config.vae, use.batch_size, side, size)),
        ]
        yield from amounts(work, use)


def tree(name: str, found: dict[str, int], notes: dict[str, str]) -> Iterator[str]:
    yield f"  {name:<16}{sum(found.values()):>14,}"
    for part, number in found.items():
        yield f"    {part:<14}{number:>14,}   {notes[part]}"


def mar_parts(mar: MARConfig) -> dict[str, str]:
    tokens, width = costs.tokens_of(mar), costs.token_width(mar)
    return {
        "encoder": f"{mar.encoder_depth} blocks, width {mar.encoder_embed_dim}, "
        f"{mar.encoder_num_heads} heads",
        "decoder": f"{mar.decoder_depth} blocks, width {mar.decoder_embed_dim}, "
        f"{mar.decoder_num_heads} heads; from the encoder's width to its own",
        "head": f"{mar.diffloss_d} blocks, width {mar.diffloss_w}",
        "embeddings": f"{mar.class_num} classes, {mar.buffer_size} buffer tokens, {tokens} tokens "
        f"of {width} values",
    }


def vae_parts(vae: VAEConfig) -> dict[str, str]:
    widths = ", ".join(str(vae.ch * mult) for mult in vae.ch_mult)
    return {
        "encoder": f"widths {widths}; {vae.num_res_blocks} residual blocks each",
        "decoder": f"the same backwards, {vae.num_res_blocks + 1} residual blocks each",
        "latents": f"{vae.z_channels} channels, a {2 ** (len(vae.ch_mult) - 1)}th of a side"
        f"{'; the linear path' if vae.linear_path else ''}",
    }


def amounts(phases: list[tuple[str, costs.Work]], use: Use) -> Iterator[str]:
    """FLOPs by part, and seconds where the rates are known."""
    parts = {name: costs.Work() for name, _ in phases}
    for name, work in phases:
        parts[name] += work
    seconds = use.rates.by_part(phases) if use.rates else {}
    for name, work in (*parts.items(), ("together", costs.total(phases))):
        took = "" if not seconds else f"{seconds.get(name, sum(seconds.values())):>14.3f} s"
        yield f"  {name:<14}{si(work.flops) + 'FLOP' if work.flops else '-':>14}{took}"


def si(number: float) -> str:
    """Three digits and a prefix: 1.32 T."""
    power = 0
    while number >= 999.5:
        number, power = number / 1000, power + 1
    digits = 0 if number >= 99.95 else 1 if number >= 9.995 else 2
    return f"{number:.{digits}f} {' kMGTPEZ'[power].strip()}"


def fitting(
    name: str,
    memory: Callable[[int], dict[str, float]],
    use: Use,
    plan: Callable[[float], tuple[int, int]] | None = None,
) -> Iterator[str]:
    """One way to do it: its memory at that batch, and the batch that fits.

    plan  from the bytes that an image needs to micro batches, `planning.plan_run`
    """
    need = memory(use.batch_size)
    line = f"  {name:<34}{si(sum(need.values())) + 'B':>7}"
    if use.memory:
        most = planning.largest_batch(lambda batch: sum(memory(batch).values()), use.memory)
        line += f", batch {most} fits in {si(use.memory)}B"
        work = sum(n for kind, n in need.items() if kind in ("activations", "at work"))
        micro, accumulate = plan(work / use.batch_size) if plan else (0, 0)
        if accumulate:
            line += f" ({micro * accumulate} as {accumulate} x {micro})"
    yield f"{line}: {', '.join(f'{kind} {si(n)}B' for kind, n in need.items() if n)}"


def training(config: Config, count: int, use: Use) -> Iterator[str]:
    """A training step on latents: memory in four ways, work and time in the preset's own.

    Behind the batch that fits: the preset's batch in micro batches, on one device.
    """
    mar = config.mar
    masked = costs.mean_mask_ratio(mar.mask_ratio_min) * costs.tokens_of(mar)
    yield (
        f"\na training step, {use.batch_size} images ({masked:.0f} of {costs.tokens_of(mar)} "
        "tokens masked)"
    )
    work = costs.training_work(mar, use.batch_size, parameters=count, size=SIZES[use.dtype])
    yield from amounts(work, use)
    for name, size in (("float32", 4), ("bfloat16 autocast", 2)):
        for checkpointing in (False, True):
            way = replace(mar, grad_checkpointing=checkpointing)
            memory = partial(planning.training_memory, way, count=count, size=size, gpu=use.gpu)
            plan = partial(
                planning.plan_run,
                count,
                memory_gb=(use.memory or 0) / 1e9,
                batch=config.training.batch_size,
                size=size,
            )
            yield from fitting(name + ", checkpointing" * checkpointing, memory, use, plan)


def sampling(config: Config, use: Use) -> Iterator[str]:
    """A sampling with the preset's settings or those asked for."""
    own = config.sampling
    num_iter = own.num_iter if use.num_iter is None else use.num_iter
    num_steps = own.num_sampling_steps if use.num_sampling_steps is None else use.num_sampling_steps
    cfg = own.cfg if use.cfg is None else use.cfg
    _, work = planning.plan_sampling(
        config,
        use.batch_size,
        use.dtype,
        math.inf,
        num_iter=num_iter,
        num_sampling_steps=num_steps,
        cfg=cfg,
    )
    yield (
        f"\nsampling, {use.batch_size} images ({num_iter} iterations, {num_steps} diffusion "
        f"steps, {f'guidance {cfg:g}' if cfg != 1 else 'no guidance'})"
    )
    yield from amounts(work, use)
    for name, size in SIZES.items():

        def memory(batch: int, size=size) -> dict[str, float]:
            return planning.sampling_memory(
                config, batch=batch, num_iter=num_iter, guided=cfg != 1, size=size
            )

        yield from fitting(name, memory, use)


# The command -------------------------------------------------------------------------------------


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

    Nothing is built and nothing is run: it is all computed from the sizes.

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
    import torch

    from mar_mini.configs import get_config
    from mar_mini.planner.memory import available_memory
    from mar_mini.planner.rates import device_rates

    config, dtype = get_config(preset), "bfloat16" if bf16 else "float32"
    if memory_gb is not None and memory_gb <= 0:
        raise ValueError(f"memory-gb is {memory_gb}; expected more than 0")
    rates = device_rates(tflops, gb_per_s, us_per_operation, here, getattr(torch, dtype))
    memory = memory_gb * 1e9 if memory_gb is not None else available_memory() if here else None
    use = Use(batch_size, num_iter, num_sampling_steps, cfg, rates, memory, dtype, gpu=not here)
    print("\n".join(describe(config, use)))
    return 0
