"""What a model computes, by formulas: FLOPs, bytes read and written, operations started.

A multiply-add counts as two FLOPs, and only matrix products and convolutions are counted: next to
them the arithmetic of everything else is nothing. What that costs is memory traffic, so bytes are
kept apart: those of products, which a device moves while it multiplies, and those of operations
element by element, which do little but move. Names of sizes: B images, N rows of tokens, D width.
"""

from collections.abc import Iterable
from dataclasses import astuple, dataclass, replace
from itertools import pairwise

from mar_mini.configs import MARConfig, VAEConfig
from mar_mini.diffloss import TimestepEmbedder
from mar_mini.diffusion import NUM_TIMESTEPS
from mar_mini.masking import masked_after, mean_mask_ratio


@dataclass(frozen=True)
class Work:
    """What a piece of a model does; pieces add up, and a number times a piece is a repetition.

    flops          of matrix products and convolutions
    product_bytes  their operands and results
    other_bytes    what all other operations read and write
    operations     how many are started, one after the other
    """

    flops: float = 0.0
    product_bytes: float = 0.0
    other_bytes: float = 0.0
    operations: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __rmul__(self, times: float) -> "Work":
        return Work(*(times * a for a in astuple(self)))


def total(phases: Iterable[tuple[str, Work]]) -> Work:
    return sum((work for _, work in phases), Work())


def linear(rows: float, inputs: int, outputs: int, size: int) -> Work:
    """A linear layer on that many rows; `size` bytes a value."""
    moved = size * (rows * (inputs + outputs) + inputs * outputs)
    return Work(2 * rows * inputs * outputs, moved, 0, 1)


def elementwise(values: float, passes: int, size: int, operations: int = 1) -> Work:
    """Operations that read or write so many values `passes` times."""
    return Work(0, 0, passes * values * size, operations)


# The transformer ---------------------------------------------------------------------------------


def block(
    batch: float, n: float, dim: int, hidden: int, size: int, wanted: float | None = None
) -> Work:
    """A transformer block on n rows an image, of which the `wanted` ones come out (all if None).

    24 D^2 FLOPs a row at the usual `hidden` = 4 D, and 4 N D for the attention.
    """
    m = n if wanted is None else wanted
    rows, out = batch * n, batch * m
    attention = Work(4 * out * n * dim, size * dim * 2 * (rows + out), 0, 1)
    return (
        elementwise(rows * dim, 2, size)  # norm1
        + linear(rows, dim, 2 * dim, size)
        + linear(out, dim, dim, size)  # keys, values; queries
        + attention
        + linear(out, dim, dim, size)
        + elementwise(out * dim, 7, size, 4)  # copy of the heads, add, norm2, add
        + linear(out, dim, hidden, size)
        + elementwise(out * hidden, 2, size)
        + linear(out, hidden, dim, size)
    )


def tokens_of(mar: MARConfig) -> int:
    """L, tokens of an image."""
    return (mar.img_size // mar.vae_stride // mar.patch_size) ** 2


def token_width(mar: MARConfig) -> int:
    """C, values of a token."""
    return mar.vae_embed_dim * mar.patch_size**2


def encoder(mar: MARConfig, batch: float, known: float, size: int) -> Work:
    """The encoder: buffer tokens and known tokens, nothing else."""
    dim, n = mar.encoder_embed_dim, mar.buffer_size + known
    one = block(batch, n, dim, int(dim * mar.mlp_ratio), size)
    return (
        linear(batch * known, token_width(mar), dim, size)
        + elementwise(batch * n * dim, 7, size, 4)  # positions, z_proj_ln, encoder_norm
        + mar.encoder_depth * one
    )


def decoder(mar: MARConfig, batch: float, known: float, wanted: float, size: int) -> Work:
    """The decoder: buffer and all tokens; of the last block only the rows that are wanted."""
    dim, n = mar.decoder_embed_dim, mar.buffer_size + tokens_of(mar)
    hidden = int(dim * mar.mlp_ratio)
    work = linear(batch * (mar.buffer_size + known), mar.encoder_embed_dim, dim, size)
    work += elementwise(batch * n * dim, 9, size, 5)  # mask tokens, scatter, cat, add, norm
    if mar.decoder_depth:
        work += (mar.decoder_depth - 1) * block(batch, n, dim, hidden, size)
        work += block(batch, n, dim, hidden, size, wanted)
    return work


# The head ----------------------------------------------------------------------------------------


def head_conditions(mar: MARConfig, rows: float, timesteps: float, size: int) -> Work:
    """The embedded conditions z of some rows, and the embedded timesteps."""
    width = mar.diffloss_w
    return (
        linear(rows, mar.decoder_embed_dim, width, size)
        + linear(timesteps, TimestepEmbedder.num_sinusoids, width, size)
        + elementwise(timesteps * width, 2, size)
        + linear(timesteps, width, width, size)
    )


def head_block(width: int, rows: float, size: int) -> Work:
    """One block of the denoising MLP: adaLN (W to 3W) and an MLP of two layers (W to W)."""
    return (
        linear(rows, width, 3 * width, size)
        + 2 * linear(rows, width, width, size)
        + elementwise(rows * width, 17, size, 6)  # SiLU, norm, modulate, SiLU, gate
    )


def head_mlp(mar: MARConfig, rows: float, size: int) -> Work:
    """The denoising MLP once, on that many rows."""
    width, channels = mar.diffloss_w, token_width(mar)
    return (
        linear(rows, channels, width, size)
        + mar.diffloss_d * head_block(width, rows, size)
        + linear(rows, width, 2 * width, size)
        + linear(rows, width, 2 * channels, size)
        + elementwise(rows * width, 14, size, 6)  # sum of conditions, final layer
    )


# The autoencoder ---------------------------------------------------------------------------------


def convolution(batch: float, inputs: int, outputs: int, kernel: int, side: int, size: int) -> Work:
    """A convolution to a map of side x side, of stride 1."""
    area, weights = batch * side**2, inputs * outputs * kernel**2
    return Work(2 * area * weights, size * (area * (inputs + outputs) + weights), 0, 1)


def resnet_block(batch: float, inputs: int, outputs: int, side: int, size: int) -> Work:
    area = batch * side**2
    work = convolution(batch, inputs, outputs, 3, side, size)
    work += convolution(batch, outputs, outputs, 3, side, size)
    work += elementwise(area * inputs, 5, size, 2) + elementwise(area * outputs, 8, size, 3)
    if inputs != outputs:
        work += convolution(batch, inputs, outputs, 1, side, size)
    return work


def attention_block(batch: float, channels: int, side: int, size: int) -> Work:
    places = side**2
    attention = Work(4 * batch * places**2 * channels, 4 * size * batch * places * channels, 0, 1)
    return (
        4 * convolution(batch, channels, channels, 1, side, size)
        + attention
        + elementwise(batch * places * channels, 12, size, 6)
    )


def middle(batch: float, channels: int, side: int, size: int) -> Work:
    both = 2 * resnet_block(batch, channels, channels, side, size)
    return both + attention_block(batch, channels, side, size)


def vae_encode(vae: VAEConfig, batch: float, side: int, size: int) -> Work:
    """Images of side x side pixels to the moments of their latents."""
    width, moments = vae.ch, 2 * vae.z_channels
    work = convolution(batch, vae.in_channels, width, 3, side, size)
    for i, mult in enumerate(vae.ch_mult):
        out = vae.ch * mult
        for a, b in pairwise([width] + [out] * vae.num_res_blocks):
            work += resnet_block(batch, a, b, side, size)
            if vae.resolution // 2**i in vae.attn_resolutions:
                work += attention_block(batch, out, side, size)
        width = out
        if i < len(vae.ch_mult) - 1:
            side //= 2
            work += convolution(batch, width, width, 3, side, size)
    work += middle(batch, width, side, size) + elementwise(batch * side**2 * width, 5, size, 2)
    work += convolution(batch, width, moments, 3, side, size)
    work += convolution(batch, moments, moments, 1, side, size)
    if vae.linear_path:
        stride = 2 ** (len(vae.ch_mult) - 1)
        work += convolution(batch, vae.in_channels, vae.z_channels, stride, side, size)
    return work


def vae_decode(vae: VAEConfig, batch: float, side: int, size: int) -> Work:
    """Latents to images of side x side pixels.

    An upsampling is one transposed convolution with a kernel of 4x4: see `vae.Upsample`.
    """
    width, stride = vae.ch * vae.ch_mult[-1], 2 ** (len(vae.ch_mult) - 1)
    side //= stride
    work = convolution(batch, vae.z_channels, vae.z_channels, 1, side, size)
    work += convolution(batch, vae.z_channels, width, 3, side, size)
    if vae.linear_path:
        work += convolution(batch, vae.z_channels, vae.in_channels, stride, side, size)
    work += middle(batch, width, side, size)
    for i, mult in reversed(list(enumerate(vae.ch_mult))):
        out = vae.ch * mult
        for a, b in pairwise([width] + [out] * (vae.num_res_blocks + 1)):
            work += resnet_block(batch, a, b, side, size)
        width = out
        if i > 0:
            work += convolution(batch, width, width, 4, side, size)
            side *= 2
    work += elementwise(batch * side**2 * width, 5, size, 2)
    return work + convolution(batch, width, vae.in_channels, 3, side, size)


# Sampling and training ---------------------------------------------------------------------------


def sampling_work(
    mar: MARConfig,
    vae: VAEConfig | None,
    *,
    batch: int,
    num_iter: int,
    num_sampling_steps: int,
    guided: bool,
    size: int = 4,
) -> list[tuple[str, Work]]:
    """The work of making `batch` images, phase by phase, each with the part that does it.

    In each iteration the encoder sees the known tokens, the decoder all of them, and the head runs
    `num_sampling_steps` times on those that the iteration predicts. With guidance everything but
    the autoencoder has both halves to do, with the class and without.

    Raises ValueError for a number of iterations that does not fit the number of tokens.
    """
    length, rows = tokens_of(mar), batch * (2 if guided else 1)
    phases, left = [], length
    for masked in masked_after(length, num_iter):
        known, predicted, left = length - left, left - masked, masked
        step = head_mlp(mar, rows * predicted, size)
        step += elementwise(batch * predicted * token_width(mar), 40, 4, 20)  # the reverse step
        conditions = head_conditions(mar, rows * predicted, num_sampling_steps, size)
        phases += [
            ("encoder", encoder(mar, rows, known, size)),
            ("decoder", decoder(mar, rows, known, predicted, size)),
            ("head", conditions + num_sampling_steps * step),
        ]
    if vae is not None:
        phases.append(("autoencoder", vae_decode(vae, batch, mar.img_size, size)))
    return phases


def training_work(
    mar: MARConfig, batch: int, *, parameters: int, masked: float | None = None, size: int = 4
) -> list[tuple[str, Work]]:
    """The work of a training step on latents that are there already, phase by phase.

    parameters  of the MAR
    masked      tokens to predict of each image; the mean of the mask ratio if None

    The backward pass does each product twice, for the gradient of the input and for that of the
    weights; the input's is left out where the input is data. Checkpointing does the blocks' forward
    pass a second time. `update` is clipping, AdamW and the average of the weights, and counts 13
    passes over them in float32.
    """
    length = tokens_of(mar)
    if masked is None:
        masked = length * mean_mask_ratio(mar.mask_ratio_min)
    known, predicted = length - masked, batch * masked
    rows, width = mar.diffusion_batch_mul * predicted, mar.diffloss_w
    timesteps = min(rows, NUM_TIMESTEPS)
    channels, sinusoids = token_width(mar), TimestepEmbedder.num_sinusoids
    forward = [
        ("encoder", encoder(mar, batch, known, size)),
        ("decoder", decoder(mar, batch, known, masked, size)),
        (
            "head",
            head_conditions(mar, predicted, timesteps, size)
            + head_mlp(mar, rows, size)
            + elementwise(rows * channels, 60, 4, 60),
        ),  # noise, loss
    ]
    data = (
        linear(batch * known, channels, mar.encoder_embed_dim, size)
        + linear(rows, channels, width, size)
        + linear(timesteps, sinusoids, width, size)
    )
    backward = 2 * total(forward) + -1 * data
    again = [("again", repeated(mar, batch, known, masked, rows, size))]
    return [
        *forward,
        *(again if mar.grad_checkpointing else ()),
        ("backward", backward),
        ("update", elementwise(parameters, 13, 4, 30)),
    ]


def repeated(mar: MARConfig, batch: int, known: float, masked: float, rows: float, size) -> Work:
    """What checkpointing computes again: the forward pass of the blocks, of the head's as well."""
    bare = replace(mar, encoder_depth=0, decoder_depth=0)
    work = encoder(mar, batch, known, size) + decoder(mar, batch, known, masked, size)
    work += -1 * (encoder(bare, batch, known, size) + decoder(bare, batch, known, masked, size))
    return work + mar.diffloss_d * head_block(mar.diffloss_w, rows, size)
