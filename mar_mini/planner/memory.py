"""What memory a model takes before anything is started, and what fits into a device."""

import math
from collections.abc import Iterable
from dataclasses import replace

import psutil
import torch
from torch import nn

from mar_mini.configs import PRESETS, Config, MARConfig, SamplingConfig
from mar_mini.diffusion import Diffusion
from mar_mini.masking import masked_after, mean_mask_ratio, tokens_per_step
from mar_mini.planner.work import (
    Work,
    autoencoder_work,
    empty,
    passes,
    sampling_work,
    total_flops,
    training_passes,
    training_work,
)

# bytes that a parameter takes while it is trained: all of it float32, and AdamW has two moments
STATE = {"weights": 4, "gradients": 4, "moments": 8, "average": 4}


def count(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def parts(config: Config) -> dict[str, dict[str, int]]:
    """Parameters of a preset by model and part."""
    found = {}
    if config.mar:
        mar = empty(config.mar)
        found["mar"] = {
            "encoder": count(mar.encoder_blocks, mar.encoder_norm),
            "decoder": count(mar.decoder_embed, mar.decoder_blocks, mar.decoder_norm),
            "head": count(mar.diffloss),
        }
        found["mar"]["embeddings"] = count(mar) - sum(found["mar"].values())
    if config.vae:
        vae = empty(config.vae)
        found["autoencoder"] = {"encoder": count(vae.encoder), "decoder": count(vae.decoder)}
        found["autoencoder"]["latents"] = count(vae) - sum(found["autoencoder"].values())
    return found


def parameters(config: Config, model: str = "mar") -> int:
    """How many the MAR has, or the autoencoder; 0 if there is none."""
    return sum(parts(config).get(model, {}).values())


def block_parameters(dim: int, mlp_ratio: float = 4.0) -> int:
    """Parameters of a transformer block of that width: 12 D^2 + 13 D at the usual ratio of 4."""
    hidden = int(dim * mlp_ratio)
    attention = (dim + 1) * 3 * dim + (dim + 1) * dim
    return attention + (dim + 1) * hidden + (hidden + 1) * dim + 2 * 2 * dim


def training_flops(config: Config) -> float:
    """FLOPs of training on one image, or on its latents where the preset has an autoencoder."""
    batch = config.training.batch_size
    return total_flops(training_work(config.mar, batch, parameters=0)) / batch


# Training ----------------------------------------------------------------------------------------


def training_memory(
    mar: MARConfig, batch: int, *, masked: int | None = None, dtype="float32", gpu=True, shards=1
) -> dict[str, float]:
    """Bytes of a training step: state that stays, and what its two passes need.

    dtype   of products: "float32", or "bfloat16" under autocast, which keeps a copy of each matrix
    gpu     attention and dropout as on a GPU
    shards  devices that share the state between them (FSDP); each gathers two blocks at a time
    """
    model, size = empty(mar), getattr(torch, dtype).itemsize
    if masked is None:
        masked = math.ceil(model.seq_len * mean_mask_ratio(mar.mask_ratio_min))
    need = {name: each * count(model) / shards for name, each in STATE.items()}
    need["bfloat16 copies"] = size * count(model) if size < 4 and shards == 1 else 0.0
    if shards > 1:
        blocks = (*model.decoder_blocks, *model.diffloss.net.res_blocks)
        need["weights"] += 2 * size * max(map(count, blocks))
    *_, kept, peak = training_passes(mar, batch, masked, dtype, gpu).T
    peak = max(kept.cumsum() - kept + peak)
    return {**need, "activations": kept.sum(), "at work": peak - kept.sum()}


def plan_run(
    count: int, image: float, memory_gb: float, batch: int, processes: int = 1, size: int = 2
) -> tuple[int, int]:
    """Images of a micro batch and micro batches a step, so that a training fits into a device.

    count      parameters; autocast adds copies of `size` bytes to their state if that is below 4
    image      bytes that each image of a micro batch needs, activations above all
    memory_gb  of each device, 10^9 bytes
    batch      images of a step, of all processes together: a multiple of their number

    Of the micro batches that divide a process's share the largest that fits; (0, 0) if not even
    one image does. Raises ValueError for a batch that cannot be shared, and for sizes below 0.
    """
    if processes < 1 or batch < 1 or batch % processes:
        raise ValueError(
            f"batch is {batch} for {processes} processes; expected a multiple of their number"
        )
    if count < 0 or not image > 0 or not memory_gb > 0:
        raise ValueError(
            f"count is {count}, image {image}, memory_gb {memory_gb}; "
            "expected a count from 0 and the others above 0"
        )
    free = 1e9 * memory_gb - (sum(STATE.values()) + (size if size < 4 else 0)) * count
    share = batch // processes
    fitting = [n for n in range(1, share + 1) if share % n == 0 and n * image <= free]
    return (fitting[-1], share // fitting[-1]) if fitting else (0, 0)


def largest_batch(need: dict[str, float], batch: int, memory: float) -> int:
    """The largest batch that fits, by what another one needs."""
    work = sum(n for kind, n in need.items() if kind in ("activations", "at work"))
    return max(0, int((memory - sum(need.values()) + work) // (work / batch)))


def check_fits(
    config: Config,
    micro_batch: int,
    memory: float,
    *,
    precision="bf16",
    grad_checkpointing=False,
    world_size=1,
    strategy="ddp",
) -> float:
    """Bytes that a process takes to train `micro_batch` images at a time on a device with `memory`.

    precision  "float32"; anything else counts as bfloat16
    strategy   "ddp", or "fsdp", where the processes share the state

    Raises ValueError, saying what would fit, if there is less.
    """
    dtype = "float32" if precision == "float32" else "bfloat16"

    def needed(checkpointing: bool, strategy: str) -> dict[str, float]:
        mar, shards = config.mar, world_size if strategy == "fsdp" else 1
        mar = replace(mar, grad_checkpointing=checkpointing)
        return training_memory(mar, micro_batch, dtype=dtype, shards=shards)

    given, times, fits = (grad_checkpointing, strategy), config.training.accumulate, []
    own = needed(*given)
    if (need := sum(own.values())) <= memory:
        return need
    for flags, way in (
        ("", given),
        ("--checkpoint-activations", (True, strategy)),
        ("--strategy fsdp", (grad_checkpointing, "fsdp")),
    ):
        most = largest_batch(needed(*way), micro_batch, memory)
        micro = max(
            (n for n in range(1, micro_batch + 1) if n <= most and micro_batch % n == 0), default=0
        )
        if micro and (way != given or not flags):
            more = f" --accumulate {times * micro_batch // micro}" if micro < micro_batch else ""
            fits.append((flags + more).strip())
    if smaller := largest_batch(own, micro_batch, memory):
        fits.append(f"--batch-size {smaller * times * world_size}")
    what = f"training {micro_batch} images at a time from {config.name!r} in {dtype}"
    raise too_large(what, need, memory, fits)


def too_large(what: str, need: float, available: float, fits: Iterable[str]) -> ValueError:
    return ValueError(
        f"{what} needs {need / 1e9:.2f} GB of memory, {available / 1e9:.2f} GB are available; "
        f"what would fit: {'; '.join(fits) or 'nothing here'}"
    )


# Sampling ----------------------------------------------------------------------------------------


def available_memory() -> float:
    """Bytes that a new process can have before others must give some up."""
    return float(psutil.virtual_memory().available)


def sampling_memory(
    config: Config, batch: int, num_iter: int, guided: bool, dtype="float32"
) -> dict[str, float]:
    """Bytes at the peak of sampling: weights, and what the hungriest phase needs beside them.

    Not in it is the process itself: Python and torch, 0.3 GB before the model is built.
    """
    mar, vae = config.mar, config.vae
    most = max(tokens_per_step(length := empty(mar).seq_len, num_iter))
    sizes = (length - most, most, 2, 2)  # known, predicted, diffusion steps, blocks
    peak = passes(mar, 1 + guided, guided, dtype, False, True, *sizes)[:, -1].max()
    if vae:
        peak = max(peak, autoencoder_work(vae, 1, mar.img_size, dtype)[1])
    weights = parameters(config) + parameters(config, "autoencoder")
    return {"weights": weights * getattr(torch, dtype).itemsize, "at work": batch * float(peak)}


def chosen(config: Config, given: dict) -> SamplingConfig:
    """How a preset samples, with the settings that are given; those that are None are its own."""
    return replace(config.sampling, **{k: v for k, v in given.items() if v is not None})


def plan_sampling(
    config: Config, batch: int, dtype: str, available: float, **given
) -> tuple[float, dict[str, Work]]:
    """Bytes at the peak of a sampling, and its work.

    available  bytes that there are
    given      num_iter, num_sampling_steps, cfg; the preset's where missing or None

    Raises ValueError for settings that cannot be, and if the memory is not there, with what would
    fit.
    """
    if config.mar is None:
        raise ValueError(f"preset {config.name!r} has no MAR to sample; choose one that has")
    own = chosen(config, given)
    guided, steps = own.cfg != 1, own.num_sampling_steps
    Diffusion(steps)  # refuses an impossible number

    def needed(config: Config, dtype: str = dtype) -> dict[str, float]:
        num_iter = min(own.num_iter, empty(config.mar).seq_len)
        return sampling_memory(config, batch, num_iter, guided, dtype)

    masked_after(empty(config.mar).seq_len, own.num_iter)  # so does this
    need = sum(needed(config).values())
    if need <= available:
        mar, vae = config.mar, config.vae
        return need, sampling_work(mar, vae, batch, own.num_iter, steps, guided, dtype)
    smaller = largest_batch(needed(config), batch, available)
    fits = [f"{smaller} at a time"] if smaller else []
    if dtype != "bfloat16" and sum(needed(config, "bfloat16").values()) <= available:
        fits.append("bfloat16 (--bf16)")
    others = [c for c in PRESETS.values() if c.mar and sum(needed(c).values()) <= available]
    if others:
        fits.append(f"one of the presets {', '.join(c.name for c in others)}")
    raise too_large(
        f"sampling {batch} at a time from {config.name!r} in {dtype}", need, available, fits
    )
