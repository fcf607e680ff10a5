"""What models compute and keep: they run on the meta device, where tensors have shapes alone.

Blocks are alike, so one to three are run, and what depends on a number of blocks, tokens or steps
is a polynomial in it.
"""

import weakref
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from mar_mini import masking
from mar_mini.configs import Config, MARConfig, SamplingConfig, VAEConfig
from mar_mini.mar import MAR
from mar_mini.vae import AutoencoderKL

DEPTHS = {"encoder": "encoder_depth", "decoder": "decoder_depth", "head": "diffloss_d"}
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_backward
# it has four products; a fifth, which a fused kernel computes once more, is not counted
FLOPS = flop_registry | {BACKWARD: lambda grad, q, k, *_, **__: 8 * q.numel() * k.shape[-2]}
meta = partial(torch.empty, device="meta")


class Work(NamedTuple):
    """What a part of a model does: numbers, or arrays with an entry for each time that it runs.

    flops          of matrix products and convolutions, a multiply-add being two
    product_bytes  their operands and results
    other_bytes    what all other operations read and write
    operations     how many are started, one after the other
    """

    flops: float | np.ndarray = 0.0
    product_bytes: float | np.ndarray = 0.0
    other_bytes: float | np.ndarray = 0.0
    operations: float | np.ndarray = 0.0


def count(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def total_flops(work: dict[str, Work]) -> float:
    return sum(float(np.sum(part.flops)) for part in work.values())


class Device(TorchFunctionMode):
    """Its kernels of attention and dropout, and autocast, of which meta tensors know nothing."""

    def __init__(self, gpu: bool):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (F.linear, F.layer_norm):  # in the dtype of their weights
            weight = args[1] if func is F.linear else kwargs["weight"]
            args = (args[0] if weight is None else args[0].to(weight.dtype), *args[1:])
        elif func is torch.addcmul:  # in the widest dtype
            args = [x.to(max((y.dtype for y in args), key=lambda d: d.itemsize)) for x in args]
        elif func is F.dropout and self.gpu:
            p = kwargs["p"] if kwargs["training"] else 0.0
            return torch.native_dropout(*args, p, True)[0] if p else args[0]
        elif func is F.scaled_dot_product_attention:
            (q, k, v), p = args, kwargs.get("dropout_p", 0.0)
            if self.gpu or not torch.is_grad_enabled():
                return ATTENTION(q, k, v, p)[0]
            weights = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1)  # see transformer.attend
            return (F.dropout(weights, p) if p else weights) @ v
        return func(*args, **kwargs)


class Counter(TorchDispatchMode):
    """Adds up the work of operations on meta tensors, and the bytes of results that are alive.

    live, peak  these bytes now, and at most
    """

    live = peak = 0

    def run(self, function: Callable, gpu: bool = True) -> tuple[Tensor | None, Work]:
        self.work = [0, 0, 0, 0]
        with Device(gpu), self:
            return function(), Work(*self.work)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs := kwargs or {}))
        read, made = (
            [x for x in tree_leaves(tree) if isinstance(x, Tensor) and x.is_meta]
            for tree in ((args, kwargs), result)
        )
        known = {x.untyped_storage()._cdata for x in read}
        new = [x.untyped_storage() for x in made if x.untyped_storage()._cdata not in known]
        if new or func._schema.is_mutable:  # not a view
            flops = FLOPS.get(func._overloadpacket)
            moved = sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in (*read, *made))
            self.work[0] += flops(*args, **kwargs, out_val=result) if flops else 0
            self.work[1 if flops else 2] += moved
            self.work[3] += 1
        for storage in new:
            self.keep(storage.nbytes())
            weakref.finalize(storage, self.keep, -storage.nbytes())
        return result

    def keep(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)


@cache
def empty(config: MARConfig | VAEConfig, dtype="float32", autocast: bool = False) -> nn.Module:
    """A model without memory for its weights; with autocast linear layers alone have the dtype."""
    with torch.device("meta"):
        model = (MAR if isinstance(config, MARConfig) else AutoencoderKL)(**asdict(config))
    for module in model.modules() if autocast else [model]:
        if isinstance(module, nn.Linear) or not autocast:
            module.to(getattr(torch, dtype))
    for parameter in model.parameters():  # gradients of weights are not what a pass needs
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    return model


def polynomial(f: Callable[..., np.ndarray], *axes: tuple) -> np.ndarray:
    """f(...) from a few of its values: for each argument where, from where on, and the degree."""
    if not axes:
        return f()
    (at, start, degree), *rest = axes
    values = np.array([polynomial(partial(f, start + i), *rest) for i in range(degree + 1)])
    result, weight = values[0], 1.0
    for i in range(degree):  # Newton's forward differences
        values, weight = np.diff(values, axis=0), weight * (at - start - i) / (i + 1)
        result = result + weight * values[0]
    return result


@cache
def passes(mar: MARConfig, rows: int, halves: int, dtype: str, gpu: bool, *sizes) -> np.ndarray:
    """What happens in a few blocks: a row for encoder, decoder and head.

    halves   in which rows are sampled, 2 with guidance; 0 for training
    sizes    known and predicted tokens of an image, diffusion steps, blocks
    returns  (3, 10): work of a forward (4) and of a backward pass (4), bytes kept between, the peak
    """
    known, predicted, steps, depth = sizes
    model = empty(replace(mar, **dict.fromkeys(DEPTHS.values(), depth)), dtype, not halves)
    places = torch.arange(model.train(not halves).seq_len).expand(rows, -1)
    mask, wanted = places >= known, places >= model.seq_len - predicted
    tokens, labels = meta(*places.shape, model.token_embed_dim), meta(rows, dtype=torch.long)

    def head(z: Tensor) -> Tensor:
        z = z.flatten(0, 1)
        if halves:
            return model.diffloss.sample(*z.chunk(halves), cfg=2.0, num_sampling_steps=steps)
        target = masking.keep(tokens, mask).flatten(0, 1)
        return model.diffloss(target, z, repeat=mar.diffusion_batch_mul)

    encoder = partial(model.forward_encoder, tokens, mask)
    x, done, table, grad = labels, [], [], meta(())
    for part in (encoder, lambda x: model.forward_decoder(x, mask, wanted), head):
        counter = Counter()
        with torch.set_grad_enabled(not halves):
            result, work = counter.run(partial(part, x), gpu)
        done.append((counter, x, result, work, counter.live))
        x = result.detach().requires_grad_(not halves)
    # as Tensor.backward, where `Device` would not be told of what checkpointing computes again
    engine = torch.autograd.Variable._execution_engine.run_backward
    for counter, x, result, work, kept in reversed(done):
        back = partial(engine, (result,), (grad,), False, False, (), True, True)
        table.append(
            [*work, *(Work() if halves else counter.run(back, gpu)[1]), kept, counter.peak]
        )
        grad = x.grad
    return np.array(table[::-1], dtype=float)


def depths(mar: MARConfig, start: int) -> tuple[np.ndarray, int, int]:
    return np.array([[getattr(mar, name)] for name in DEPTHS.values()]), start, 1


def training_passes(mar: MARConfig, batch: int, masked: float, dtype: str, gpu=True) -> np.ndarray:
    """`passes` of a training step at any depth; so many masked tokens of an image on average."""

    def run(masked: int, depth: int) -> np.ndarray:
        return passes(mar, batch, 0, dtype, gpu, empty(mar).seq_len - masked, masked, 0, depth)

    return polynomial(run, (masked, int(masked), int(masked % 1 > 0)), depths(mar, 2))


def training_work(
    mar: MARConfig, batch: int, masked: float | None = None, dtype="float32"
) -> dict[str, Work]:
    """The work of a training step on latents that are there already, by part.

    masked  tokens to predict of each image; the mean of the mask ratio if None

    `again` is what checkpointing computes again. `update` is clipping, AdamW and the average of the
    weights, and counts 13 passes over them in float32.
    """
    if masked is None:
        masked = empty(mar).seq_len * masking.mean_mask_ratio(mar.mask_ratio_min)
    plain = training_passes(replace(mar, grad_checkpointing=False), batch, masked, dtype)
    work = {name: Work(*row[:4]) for name, row in zip(DEPTHS, plain, strict=True)}
    if mar.grad_checkpointing:
        again = training_passes(mar, batch, masked, dtype) - plain
        work["again"] = Work(*again[:, 4:8].sum(0))
    update = Work(0.0, 0.0, 13 * 4 * count(empty(mar)), 30)
    return work | {"backward": Work(*plain[:, 4:8].sum(0)), "update": update}


def sampling_work(
    config: Config, batch: int, settings: SamplingConfig, dtype="float32"
) -> dict[str, Work]:
    """The work of making `batch` images, by part, with an entry for each iteration.

    With guidance all but the autoencoder work on both halves, with the class and without. Raises
    ValueError for a number of iterations that does not fit the number of tokens.
    """
    mar, halves, length = config.mar, 1 + (settings.cfg != 1), empty(config.mar).seq_len
    run, blocks = partial(passes, mar, batch * halves, halves, dtype, True), depths(mar, 1)
    masked = np.array([length, *masking.masked_after(length, settings.num_iter)])[:, None, None]
    known, predicted = (length - masked[:-1], 0, 2), (-np.diff(masked, axis=0), 1, 1)
    # what known tokens cost and what predicted tokens cost add up
    table = polynomial(lambda n, depth: run(n, 1, 2, depth), known, blocks)
    table = table - polynomial(partial(run, 0, 1, 2), blocks)
    table += polynomial(partial(run, 0), predicted, (settings.num_sampling_steps, 2, 1), blocks)
    work = {name: Work(*table[:, i, :4].T) for i, name in enumerate(DEPTHS)}
    if config.vae:
        decoding = autoencoder_work(config.vae, batch, mar.img_size, dtype)[0]["decoding"]
        work["autoencoder"] = decoding
    return work


@torch.no_grad()
def autoencoder_work(
    vae: VAEConfig, batch: int, side: int, dtype="float32"
) -> tuple[dict[str, Work], int]:
    """Encoding images of side x side pixels and decoding them; bytes at the peak of decoding."""
    model, encoder, decoder = empty(vae, dtype).eval(), Counter(), Counter()
    images = meta(batch, vae.in_channels, side, side, dtype=getattr(torch, dtype))
    latents = meta(batch, vae.z_channels, *[side // model.stride] * 2, dtype=images.dtype)
    encoding = encoder.run(lambda: model.encode(images).mean)[1]
    decoding = decoder.run(lambda: model.decode(latents))[1]
    return {"encoding": encoding, "decoding": decoding}, decoder.peak
