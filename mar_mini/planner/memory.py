"""What memory a model takes before anything is started, and what fits into a device."""

import math
from dataclasses import replace

import psutil
import torch

from mar_mini.configs import PRESETS, Config, MARConfig, SamplingConfig
from mar_mini.diffusion import Diffusion
from mar_mini.masking import mean_mask_ratio, tokens_per_step
from mar_mini.planner import work
from mar_mini.planner.work import count, empty

# bytes that a parameter takes while it is trained: all of it float32, and AdamW has two moments
STATE = {"weights": 4, "gradients": 4, "moments": 8, "average": 4}


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
    return work.total_flops(work.training_work(config.mar, batch)) / batch


def training_memory(
    mar: MARConfig, batch: int, masked: int | None = None, dtype="float32", gpu=True, shards=1
) -> dict[str, float]:
    """Bytes of a training step: state that stays, and what its two passes need.

    dtype   of products: "float32", or "bfloat16" under autocast, which keeps a copy of each matrix
    gpu     attention and dropout as on a GPU
    shards  devices that share the state (FSDP), each of which gathers two blocks at a time
    """
    model, size = empty(mar), getattr(torch, dtype).itemsize
    if masked is None:
        masked = math.ceil(model.seq_len * mean_mask_ratio(mar.mask_ratio_min))
    need = {name: each * count(model) / shards for name, each in STATE.items()}
    need["bfloat16 copies"] = size * count(model) if size < 4 and shards == 1 else 0.0
    if shards > 1:
        need["weights"] += (
            2 * size * max(map(count, (*model.decoder_blocks, *model.diffloss.net.res_blocks)))
        )
    few = min(batch, 64)  # the memory of more images is in proportion
    *_, kept, peak = work.training_passes(mar, few, masked, dtype, gpu).T * (batch / few)
    extra = max(kept.cumsum() - kept + peak) - kept.sum()
    return need | {"activations": float(kept.sum()), "at work": float(extra)}


def largest_batch(need: dict[str, float], batch: int, memory: float) -> int:
    """The largest batch that fits, by what another one needs."""
    grows = need.get("activations", 0.0) + need["at work"]
    return max(0, int((memory - sum(need.values()) + grows) // (grows / batch)))


def plan_run(
    count: int, image: float, memory_gb: float, batch: int, processes: int = 1, size: int = 2
) -> tuple[int, int]:
    """Images of a micro batch and micro batches a step, so that a training fits into a device.

    count      parameters; autocast adds copies of `size` bytes to their state if that is below 4
    image      bytes that each image of a micro batch needs, activations above all
    memory_gb  of each device, 10^9 bytes
    batch      images of a step, of all processes together

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
    return divide(batch // processes, free // image)


def divide(share: int, most: float) -> tuple[int, int]:
    """The largest divisor of a share up to a limit, and how often it goes; (0, 0) if none."""
    micro = max((n for n in range(1, share + 1) if share % n == 0 and n <= most), default=0)
    return (micro, share // micro) if micro else (0, 0)


def check_fits(
    config: Config, micro_batch: int, memory: float, precision="bf16", world_size=1, strategy="ddp"
) -> float:
    """Bytes that a process takes to train on `micro_batch` images at a time.

    config     its MAR says whether activations are checkpointed, its training how many accumulate
    memory     of the device, bytes
    precision  "float32"; anything else counts as bfloat16
    strategy   of `world_size` processes: "ddp", or "fsdp", where they share the state

    Raises ValueError, saying what would fit, if there is less memory.
    """
    training, less = config.training, config.mar.grad_checkpointing
    dtype = "float32" if precision == "float32" else "bfloat16"
    ways = {"": (less, strategy)}
    ways |= {} if less else {"--checkpoint-activations": (True, strategy)}
    ways |= {"--strategy fsdp": (less, "fsdp")} if world_size > 1 and strategy != "fsdp" else {}
    fits = []
    for flags, (less, strategy) in ways.items():
        mar, shards = replace(config.mar, grad_checkpointing=less), world_size
        need = training_memory(
            mar, micro_batch, None, dtype, True, shards if strategy == "fsdp" else 1
        )
        most = largest_batch(need, micro_batch, memory)
        if not flags:
            own, smaller = sum(need.values()), most * training.accumulate * world_size
            if own <= memory:
                return own
        if times := divide(micro_batch, most)[1]:
            more = f" --accumulate {times * training.accumulate}" if times > 1 else ""
            fits.append((flags + more).strip())
    fits += [f"--batch-size {smaller}"] if smaller else []
    what = f"training on {micro_batch} images at a time with {config.name!r} in {dtype}"
    raise too_large(what, own, memory, fits)


def too_large(what: str, need: float, available: float, fits: list[str]) -> ValueError:
    return ValueError(
        f"{what} needs {need / 1e9:.2f} GB of memory, {available / 1e9:.2f} GB are available; "
        f"what would fit: {'; '.join(fits) or 'nothing here'}"
    )


# Sampling ----------------------------------------------------------------------------------------


def available_memory() -> float:
    """Bytes that a new process can have before others must give some up."""
    return float(psutil.virtual_memory().available)


def sampling_memory(
    config: Config, batch: int, settings: SamplingConfig, dtype="float32"
) -> dict[str, float]:
    """Bytes at the peak of sampling: weights, and what the hungriest phase needs beside them.

    Not in it is the process itself: Python and torch, 0.3 GB before the model is built.
    """
    mar, halves = config.mar, 1 + (settings.cfg != 1)
    most = max(tokens_per_step(length := empty(mar).seq_len, settings.num_iter))
    peak = work.passes(mar, halves, halves, dtype, True, length - most, most, 2, 2)[:, -1].max()
    if config.vae:
        peak = max(peak, work.autoencoder_work(config.vae, 1, mar.img_size, dtype)[1])
    weights = parameters(config) + parameters(config, "autoencoder")
    return {"weights": weights * getattr(torch, dtype).itemsize, "at work": batch * float(peak)}


def sampling_settings(config: Config, given: dict) -> SamplingConfig:
    """The settings that are given, and the preset's own where they are None.

    Raises ValueError for a preset without a MAR, and for numbers that cannot be.
    """
    if config.mar is None:
        raise ValueError(f"preset {config.name!r} has no MAR to sample; choose one that has")
    settings = replace(config.sampling, **{k: v for k, v in given.items() if v is not None})
    Diffusion(settings.num_sampling_steps)
    tokens_per_step(empty(config.mar).seq_len, settings.num_iter)
    return settings


def plan_sampling(
    config: Config, batch: int, dtype: str, available: float, **given
) -> tuple[float, dict[str, work.Work]]:
    """Bytes at the peak of a sampling, and its work; given are settings that are not the preset's.

    Raises ValueError for settings that cannot be, and if so many bytes are not available, with what
    would fit.
    """
    settings = sampling_settings(config, given)

    def needed(config: Config, dtype: str = dtype) -> dict[str, float]:
        num_iter = min(settings.num_iter, empty(config.mar).seq_len)
        return sampling_memory(config, batch, replace(settings, num_iter=num_iter), dtype)

    need = sum(needed(config).values())
    if need <= available:
        return need, work.sampling_work(config, batch, settings, dtype)
    smaller = largest_batch(needed(config), batch, available)
    fits = [f"{smaller} at a time"] if smaller else []
    if dtype != "bfloat16" and sum(needed(config, "bfloat16").values()) <= available:
        fits.append("bfloat16 (--bf16)")
    others = [c for c in PRESETS.values() if c.mar and sum(needed(c).values()) <= available]
    if others:
        fits.append(f"one of the presets {', '.join(c.name for c in others)}")
    what = f"sampling {batch} at a time from {config.name!r} in {dtype}"
    raise too_large(what, need, available, fits)
