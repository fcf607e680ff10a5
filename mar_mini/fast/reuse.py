"""What one iteration of sampling may take over from the one before: features and guidance.

Between two iterations a few tokens become known and everything else stays. The exact sampler
computes all features again, because in a bidirectional model every known token changes all others.
Most of them change little. So between two full iterations only the rows that matter are computed -
tokens that just became known, and those to be predicted - while the other rows answer with the keys
and values that they had. Source: LazyMAR (Yan et al. 2025), where the cached rows are chosen by
how much they change; here by their role alone.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mar_mini.mar import MAR, NO_CLASS
from mar_mini.masking import positions
from mar_mini.tokens import take
from mar_mini.transformer import Block, attend


class Memory:
    """Keys and values of all rows of a stack of blocks, each as it was when last computed.

    size  number of rows N, or None for rows that are appended one after the other
    """

    def __init__(self, blocks: nn.ModuleList, size: int | None = None):
        self.blocks, self.size = blocks, size
        self.keys_values: list[tuple[Tensor, Tensor] | None] = [None] * len(blocks)

    def write(self, i: int, new: tuple[Tensor, Tensor], places: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of block i, (B, H, N, d) each, once those of the new rows are in."""
        old = self.keys_values[i]
        if old is None:
            batch, heads, rows, depth = new[0].shape
            rows = 0 if self.size is None else self.size
            old = tuple(x.new_zeros(batch, heads, rows, depth) for x in new)
        if self.size is None:
            old = tuple(torch.cat(pair, dim=2) for pair in zip(old, new, strict=True))
        else:
            index = places[:, None, :, None].expand_as(new[0])  # (B, H, K, d)
            for a, b in zip(old, new, strict=True):
                a.scatter_(2, index, b)
        self.keys_values[i] = old
        return old

    def run(
        self,
        x: Float[Tensor, "B K D"],
        places: Int[Tensor, "B K"],
        rows: Int[Tensor, "B M"] | None = None,
    ) -> Float[Tensor, "B M D"]:
        """The blocks on K rows alone, which stand at those places of N; `rows` (of K) come out."""
        for i, block in enumerate(self.blocks):
            wanted = rows if i == len(self.blocks) - 1 else None
            q, k, v = block.attn.project(block.norm1(x), wanted)  # (B, H, K, d)
            h = attend(q, *self.write(i, (k, v), places)).transpose(1, 2).flatten(2)
            x = (x if wanted is None else take(x, wanted)) + block.attn.proj(h)
            x = x + block.mlp(block.norm2(x))  # (B, K or M, D)
        return x if len(self.blocks) or rows is None else take(x, rows)


class Features:
    """z of one batch of images from iteration to iteration, most rows out of memory."""

    def __init__(self, model: MAR, labels: Int[Tensor, " B"]):
        if not all(type(b) is Block for b in (*model.encoder_blocks, *model.decoder_blocks)):
            raise ValueError(
                "reusing features needs the blocks of mar_mini.transformer, this model has others; "
                "leave it out"
            )
        self.model, self.labels, self.known = model, labels, None

    def z(
        self, tokens: Tensor, mask: Bool[Tensor, "B L"], wanted: Bool[Tensor, "B L"], full: bool
    ) -> Float[Tensor, "B M E"]:
        """z of the wanted places; `full` computes all rows anew, and so does the first call."""
        model, n = self.model, self.model.buffer_size
        full = full or self.known is None
        if full:
            self.encoder = Memory(model.encoder_blocks)
            self.decoder = Memory(model.decoder_blocks, n + model.seq_len)
        new = positions(~mask if full else ~mask & ~self.known)  # (B, K)
        empty = positions(mask if full else wanted)  # (B, A)
        self.known = ~mask
        x, places = model.embed(tokens, new), new + n  # (B, K, D), (B, K)
        if full:
            buffer = model.embed_buffer(self.labels)  # (B, n, D)
            x = torch.cat([buffer, x], dim=1)  # (B, n + K, D)
            first = torch.arange(n, device=mask.device).expand(len(mask), -1)  # (B, n)
            places = torch.cat([first, places], dim=1)  # (B, n + K)
        x = self.encoder.run(model.z_proj_ln(x), places)
        x = model.decoder_embed(model.encoder_norm(x))  # (B, n + K, E)
        mask_tokens = model.mask_token.to(x.dtype).expand(*empty.shape, -1)  # (B, A, E)
        x = torch.cat([x, mask_tokens], dim=1)  # (B, P, E)
        places = torch.cat([places, empty + n], dim=1)  # (B, P)
        target = positions(wanted)  # (B, M)
        x = x + take(model.decoder_pos_embed_learned, places)
        x = self.decoder.run(x, places, where(target + n, places))  # (B, M, E)
        return model.decoder_norm(x) + take(model.diffusion_pos_embed_learned, target)


def where(places: Int[Tensor, "B M"], among: Int[Tensor, "B P"]) -> Int[Tensor, "B M"]:
    """The index of each place in a list that has it once."""
    return (places[:, :, None] == among[:, None, :]).int().argmax(dim=2)


@dataclass(frozen=True)
class Reuse:
    """Compute z as seldom as asked for: pass it to `sample` as `conditions=`.

    refresh_features  recompute all rows every N iterations; 1 = always, exactly
    refresh_guidance  recompute what the class changes in z every N iterations, and add it to z in
                      the others; 1 = always, exactly

    Raises ValueError for numbers below 1, and for a model with other blocks.
    """

    refresh_features: int = 1
    refresh_guidance: int = 1

    def __post_init__(self):
        for name, every in vars(self).items():
            if not isinstance(every, int) or every < 1:
                raise ValueError(f"{name} is {every}; expected 1 (always) or a larger integer")

    def __call__(self, model: MAR, labels: Int[Tensor, " B"]) -> "Reused":
        return Reused(self, model, labels)


class Reused:
    """The conditions z of one generation, with and without class; called once an iteration."""

    def __init__(self, reuse: Reuse, model: MAR, labels: Int[Tensor, " B"]):
        self.reuse, self.step, self.difference = reuse, 0, None
        self.with_class = Features(model, labels)
        self.without = Features(model, torch.full_like(labels, NO_CLASS))

    def __call__(
        self, tokens: Tensor, mask: Tensor, predicted: Bool[Tensor, "B L"], guided: bool
    ) -> tuple[Float[Tensor, "N E"], Float[Tensor, "N E"] | None]:
        """z and z_uncond (None if not guided) of the places to predict, batch-major."""
        step, every = self.step, self.reuse.refresh_guidance
        self.step, full = step + 1, step % self.reuse.refresh_features == 0
        if not guided:
            return self.with_class.z(tokens, mask, predicted, full).flatten(0, 1), None
        if self.difference is not None and step % every:
            z = self.with_class.z(tokens, mask, predicted, full).flatten(0, 1)  # (N, E)
            return z, z + self.difference[predicted]
        # everything that is still masked, since later iterations ask for it
        wanted = mask if every > 1 else predicted
        z, without = (f.z(tokens, mask, wanted, full) for f in (self.with_class, self.without))
        picked = predicted[wanted]  # (B * M,)
        if every > 1:
            self.difference = z.new_zeros(*mask.shape, z.shape[-1])  # (B, L, E)
            self.difference[wanted] = (without - z).flatten(0, 1)
        return z.flatten(0, 1)[picked], without.flatten(0, 1)[picked]
