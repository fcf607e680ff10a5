"""What a model takes before anything is started: its parameters and the memory of its use."""

from collections.abc import Callable
from dataclasses import asdict
from functools import cache

import psutil
import torch
from torch import nn

from mar_mini.configs import PRESETS, Config, MARConfig, VAEConfig
from mar_mini.diffloss import TimestepEmbedder
from mar_mini.diffusion import NUM_TIMESTEPS, Diffusion
from mar_mini.mar import MAR
from mar_mini.masking import mean_mask_ratio, tokens_per_step
from mar_mini.planner.work import Work, sampling_work, token_width, tokens_of, total, training_work
from mar_mini.vae import AutoencoderKL

SIZES = {"float32": 4, "bfloat16": 2}  # bytes of a value
LOSS = 14  # values that the loss keeps for each value of a token
# bytes that a parameter takes while it is trained: all of it float32, and AdamW has two moments
STATE = {"weights": 4, "gradients": 4, "moments": 8, "average": 4}


@cache
def parts(config: Config) -> dict[str, dict[str, int]]:
    """Parameters of a preset by model and part; it is built without memory, on the meta device."""
    with torch.device("meta"):
        mar = MAR(**asdict(config.mar)) if config.mar else None
        vae = AutoencoderKL(**asdict(config.vae)) if config.vae else None
    found = {}
    if mar is not None:
        found["mar"] = {
            "encoder": count(mar.encoder_blocks, mar.encoder_norm),
            "decoder": count(mar.decoder_embed, mar.decoder_blocks, mar.decoder_norm),
            "head": count(mar.diffloss),
        }
        found["mar"]["embeddings"] = count(mar) - sum(found["mar"].values())
    if vae is not None:
        found["autoencoder"] = {"encoder": count(vae.encoder), "decoder": count(vae.decoder)}
        found["autoencoder"]["latents"] = count(vae) - sum(found["autoencoder"].values())
    return found


def count(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def block_parameters(dim: int, mlp_ratio: float = 4.0) -> int:
    """Parameters of a transformer block of that width: 12 D^2 + 13 D at the usual ratio of 4.

    Into how many heads the width is cut makes no difference. See `transformer.Block`.
    """
    hidden = int(dim * mlp_ratio)
    attention = (dim + 1) * 3 * dim + (dim + 1) * dim
    return attention + (dim + 1) * hidden + (hidden + 1) * dim + 2 * 2 * dim


def parameters(config: Config, model: str = "mar") -> int:
    """How many the MAR has, or the autoencoder; 0 if there is none."""
    return sum(parts(config).get(model, {}).values())


def training_flops(config: Config) -> float:
    """FLOPs of training on one image, or on its latents where the preset has an autoencoder."""
    batch = config.training.batch_size
    work = training_work(config.mar, batch, parameters=parameters(config))
    return total(work).flops / batch


def sampling_memory(
    config: Config, *, batch: int, num_iter: int, guided: bool, size: int = 4
) -> dict[str, float]:
    """Bytes at the peak of sampling: weights, and what the hungriest phase needs beside them.

    Not in it is the process itself: Python and torch, 0.3 GB before the model is built.

    mlp          rows of a block that are alive in its MLP: input, residual, norm (D each), and the
                 hidden layer before and after GELU
    head         rows of the denoising MLP: about ten tensors of its width
    autoencoder  five copies of its largest map: input, activation and result of a convolution, and
                 the two that a CPU rearranges for it
    """
    mar, vae = config.mar, config.vae
    length, rows = tokens_of(mar), batch * (2 if guided else 1)
    dim = max(mar.encoder_embed_dim, mar.decoder_embed_dim)
    most = max(tokens_per_step(length, num_iter))
    needs = {
        "mlp": rows * (mar.buffer_size + length) * (3 * dim + 2 * int(dim * mar.mlp_ratio)),
        "head": rows * most * 10 * mar.diffloss_w,
        "autoencoder": 5 * batch * largest_map(vae, mar.img_size) if vae else 0,
    }
    weights = parameters(config) + parameters(config, "autoencoder")
    return {"weights": weights * size, "at work": size * max(needs.values())}


def largest_map(vae: VAEConfig, side: int) -> int:
    """Values of the largest feature map of an image: a level's first block has the width below."""
    widths = [vae.ch * mult for mult in vae.ch_mult]
    below = [*widths[1:], widths[-1]]
    return max(
        max(a, b) * (side // 2**i) ** 2 for i, (a, b) in enumerate(zip(widths, below, strict=True))
    )


def block_activations(
    dim: int, hidden: int, heads: int, n: float, dropout: float, size: int, gpu: bool
) -> float:
    """Bytes that one row of a transformer block keeps for the backward pass.

    The residual stream in front of both norms stays float32 under autocast; the norms' results, q,
    k, v, the heads' result and both sides of the GELU have the size of products. The attention
    weights are kept where they are written out (`transformer.attend` on a CPU), and dropout keeps
    which values it let through, in one byte on a GPU.
    """
    kept = 4 * 2 * dim + size * (6 * dim + 2 * hidden)
    weights = 0.0 if gpu else heads * n
    if not dropout:
        return kept + size * weights
    mask = 1 if gpu else size
    return kept + mask * (2 * dim + hidden + weights) + 2 * size * weights


def head_activations(width: int, size: int, gpu: bool) -> float:
    """Bytes that one row of a block of the denoising MLP keeps for the backward pass.

    Ten tensors of its width: SiLU of the condition, shift, scale and gate, the state, its norm, the
    modulated norm, both sides of the MLP's SiLU, and its result. Under autocast on a GPU three of
    them (state, norm, scale) are there in float32 too, as LayerNorm works in it.
    """
    wide = 4 * 3 - size if gpu and size < 4 else 0
    return width * (10 * size + wide)


def activations(
    mar: MARConfig, batch: int, *, masked: float | None = None, size: int = 4, gpu: bool = True
) -> float:
    """Bytes that a training step keeps between its forward and its backward pass.

    With checkpointing a block keeps its input alone, and all of it is there for one at a time.
    """
    length = tokens_of(mar)
    if masked is None:
        masked = length * mean_mask_ratio(mar.mask_ratio_min)
    dropout = mar.attn_dropout or mar.proj_dropout
    kept, whole = 0.0, [0.0]
    for dim, depth, heads, n in (
        (
            mar.encoder_embed_dim,
            mar.encoder_depth,
            mar.encoder_num_heads,
            mar.buffer_size + length - masked,
        ),
        (mar.decoder_embed_dim, mar.decoder_depth, mar.decoder_num_heads, mar.buffer_size + length),
    ):
        hidden = int(dim * mar.mlp_ratio)
        one = batch * n * block_activations(dim, hidden, heads, n, dropout, size, gpu)
        kept += depth * (4 * batch * n * dim if mar.grad_checkpointing else one)
        kept += 3 * 4 * batch * n * dim  # embeddings and norms around them
        whole.append(one)
    rows, width = mar.diffusion_batch_mul * masked * batch, mar.diffloss_w
    one = rows * head_activations(width, size, gpu)
    kept += mar.diffloss_d * (size * rows * width if mar.grad_checkpointing else one)
    kept += rows * (7 * size * width + LOSS * 4 * token_width(mar))  # condition, last layer
    kept += size * min(rows, NUM_TIMESTEPS) * (2 * width + TimestepEmbedder.num_sinusoids)
    return kept + (max(*whole, one) if mar.grad_checkpointing else 0.0)


def training_memory(
    mar: MARConfig, batch: int, *, count: int, size: int = 4, gpu: bool = True, shards: int = 1
) -> dict[str, float]:
    """Bytes of a training step: state that stays, and what its two passes need.

    count   parameters
    size    bytes of a value in products: 4, or 2 under bfloat16 autocast
    shards  devices that share weights, gradients, moments and average between them (FSDP); each
            then gathers two blocks at a time

    Weights, gradients, both of AdamW's moments and the weight average are float32. Autocast keeps
    each matrix in bfloat16 too until the backward pass is over. `at work` is the gradient of the
    largest activation, and what it is computed from.
    """
    length = tokens_of(mar)
    masked = mean_mask_ratio(mar.mask_ratio_min) * length
    hidden = max(mar.encoder_embed_dim, mar.decoder_embed_dim) * mar.mlp_ratio
    largest = max(
        (mar.buffer_size + length) * hidden, mar.diffusion_batch_mul * masked * 3 * mar.diffloss_w
    )
    one = block_parameters(mar.decoder_embed_dim, mar.mlp_ratio)
    gathered = 2 * size * max(one, 5 * mar.diffloss_w**2) if shards > 1 else 0.0
    state = {name: each * count / shards for name, each in STATE.items()}
    return {
        **state,
        "weights": state["weights"] + gathered,
        "bfloat16 copies": size * count if size < 4 and shards == 1 else 0.0,
        "activations": activations(mar, batch, size=size, gpu=gpu),
        "at work": 2 * size * batch * largest,
    }


def plan_run(
    count: int, image: float, memory_gb: float, batch: int, processes: int = 1, size: int = 2
) -> tuple[int, int]:
    """Images of a micro batch and micro batches a step, so that a training fits into a device.

    count      parameters; their state is float32, and autocast adds copies of `size` bytes if that
               is below 4
    image      bytes that each image of a micro batch needs, activations above all
    memory_gb  of each device, 10^9 bytes
    batch      images of a step, of all processes together: a multiple of their number
    processes  that share the batch, each with a whole model on a device of its own

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
    copies = size if size < 4 else 0
    free = 1e9 * memory_gb - (sum(STATE.values()) + copies) * count
    share = batch // processes
    fitting = [n for n in range(1, share + 1) if share % n == 0 and n * image <= free]
    return (fitting[-1], share // fitting[-1]) if fitting else (0, 0)


def largest_batch(memory: Callable[[int], float], limit: float) -> int:
    """The largest batch whose memory is within the limit; 0 if not even one fits."""
    if memory(1) > limit:
        return 0
    low, high = 1, 2
    while memory(high) <= limit:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if memory(middle) <= limit else (low, middle)
    return low


def available_memory() -> float:
    """Bytes that a new process can have before others must give some up."""
    return float(psutil.virtual_memory().available)


def plan_sampling(
    config: Config,
    batch: int,
    dtype: str,
    available: float,
    *,
    num_iter: int | None = None,
    num_sampling_steps: int | None = None,
    cfg: float | None = None,
) -> tuple[float, list[tuple[str, Work]]]:
    """Bytes at the peak of a sampling, and its work; settings that are None are the preset's.

    available  bytes that there are

    Raises ValueError for settings that cannot be, and if the memory is not there, with what would
    fit.
    """
    if config.mar is None:
        raise ValueError(f"preset {config.name!r} has no MAR to sample; choose one that has")
    own = config.sampling
    num_iter = own.num_iter if num_iter is None else num_iter
    num_steps = own.num_sampling_steps if num_sampling_steps is None else num_sampling_steps
    guided = (own.cfg if cfg is None else cfg) != 1
    Diffusion(num_steps)  # refuses an impossible number
    phases = sampling_work(
        config.mar,
        config.vae,
        batch=batch,
        num_iter=num_iter,
        num_sampling_steps=num_steps,
        guided=guided,
        size=SIZES[dtype],
    )
    settings = {"batch": batch, "num_iter": num_iter, "guided": guided}
    return check_memory(config, dtype, available, **settings), phases


def check_memory(config: Config, dtype: str, available: float, **settings) -> float:
    """Bytes that sampling takes at its peak; settings as for `sampling_memory`.

    Raises ValueError if that is more than what is available, with what would fit.
    """

    def needed(config: Config, dtype: str = dtype, **changes) -> float:
        settings_ = {**settings, **changes, "size": SIZES[dtype]}
        settings_["num_iter"] = min(settings_["num_iter"], tokens_of(config.mar))
        return sum(sampling_memory(config, **settings_).values())

    need = needed(config)
    if need <= available:
        return need
    fits = []
    smaller = largest_batch(lambda batch: needed(config, batch=batch), available)
    if smaller:
        fits.append(f"{smaller} at a time")
    if dtype != "bfloat16" and needed(config, "bfloat16") <= available:
        fits.append("bfloat16 (--bf16)")
    others = [c.name for c in PRESETS.values() if c.mar and needed(c) <= available]
    if others:
        fits.append(f"one of the presets {', '.join(others)}")
    raise ValueError(
        f"sampling {settings['batch']} at a time from {config.name!r} in {dtype} needs "
        f"{need / 1e9:.2f} GB of memory, {available / 1e9:.2f} GB are available; what would fit: "
        f"{'; '.join(fits) or 'nothing here'}"
    )
