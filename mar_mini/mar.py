"""The masked autoregressive model: encoder on the known tokens, decoder on all, head on the masked.

Parameter names and shapes are those of the published weights (MAR section 3.4 and figure 3).
"""

import math
from dataclasses import dataclass
from inspect import signature

import torch
from huggingface_hub import PyTorchModelHubMixin
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mar_mini import masking, tokens
from mar_mini.configs import MARConfig
from mar_mini.diffloss import DiffLoss, masked_rows
from mar_mini.tokens import take
from mar_mini.transformer import LAYER_NORM_EPS, Block

NO_CLASS = -1  # the label of an image whose class is not given, or dropped


@dataclass(frozen=True)
class StepDraws:
    """Everything random in a training step of B images, but dropout."""

    mask: Tensor  # (B, L) bool, True = masked, the same number in each row
    num_masked: int  # that number, M
    dropped: Tensor  # (B,) bool, True = the label is left out
    # of R * B * M rows for R = diffusion_batch_mul, repetition-major, then batch, then position;
    # None for a head that draws for itself
    t: Tensor | None
    noise: Tensor | None

    def rows(self, rows: slice) -> "StepDraws":
        """Give the part of some images of the batch."""

        def part(x: Tensor | None) -> Tensor | None:
            shape = (-1, len(self.mask), self.num_masked)  # (R, B, M)
            return None if x is None else x.unflatten(0, shape)[:, rows].flatten(0, 2)

        mask, dropped = self.mask[rows], self.dropped[rows]
        return StepDraws(mask, self.num_masked, dropped, part(self.t), part(self.noise))


class MAR(nn.Module, PyTorchModelHubMixin):
    """Masked autoregressive image generation with a diffusion head (arXiv 2406.11838).

    block, head  what to build it from: anything called like `Block` and `DiffLoss`
    settings     the fields of `configs.MARConfig`; ValueError if they do not fit each other
    """

    def __init__(self, *, block=Block, head=DiffLoss, **settings):
        super().__init__()
        c = MARConfig(**settings)
        if not 0 < c.mask_ratio_min <= 1:
            raise ValueError(f"mask_ratio_min is {c.mask_ratio_min}; expected above 0 and up to 1")
        self.seq_h = self.seq_w = tokens.grid_side(c.img_size, c.vae_stride, c.patch_size)
        self.seq_len = self.seq_h * self.seq_w
        self.token_embed_dim = c.vae_embed_dim * c.patch_size**2
        self.patch_size, self.vae_embed_dim = c.patch_size, c.vae_embed_dim
        self.class_num, self.grad_checkpointing = c.class_num, c.grad_checkpointing
        self.mask_ratio_min, self.label_drop_prob = c.mask_ratio_min, c.label_drop_prob
        self.buffer_size, self.diffusion_batch_mul = c.buffer_size, c.diffusion_batch_mul
        length = c.buffer_size + self.seq_len

        def stack(width: int, depth: int, heads: int) -> nn.ModuleList:
            settings = (width, heads, c.mlp_ratio, c.attn_dropout, c.proj_dropout)
            return nn.ModuleList(block(*settings) for _ in range(depth))

        # encoder
        dim = c.encoder_embed_dim
        self.class_emb = nn.Embedding(c.class_num, dim)
        self.fake_latent = nn.Parameter(torch.empty(1, dim))  # stands in for "no class"
        self.z_proj = nn.Linear(self.token_embed_dim, dim)
        self.z_proj_ln = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.encoder_pos_embed_learned = nn.Parameter(torch.empty(1, length, dim))
        self.encoder_blocks = stack(dim, c.encoder_depth, c.encoder_num_heads)
        self.encoder_norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)

        # decoder
        dim = c.decoder_embed_dim
        self.decoder_embed = nn.Linear(c.encoder_embed_dim, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.decoder_pos_embed_learned = nn.Parameter(torch.empty(1, length, dim))
        self.decoder_blocks = stack(dim, c.decoder_depth, c.decoder_num_heads)
        self.decoder_norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.empty(1, self.seq_len, dim))
        self.reset_parameters()

        # head
        size, steps = (c.diffloss_d, c.diffloss_w), c.num_sampling_steps
        self.diffloss = head(self.token_embed_dim, dim, *size, steps, c.grad_checkpointing)

    def reset_parameters(self) -> None:
        """Xavier for linear layers, normal of std 0.02 for embeddings (MAR's published code)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        parts = ("encoder", "decoder", "diffusion")
        positions = [getattr(self, f"{part}_pos_embed_learned") for part in parts]
        for table in (self.class_emb.weight, self.fake_latent, self.mask_token, *positions):
            nn.init.normal_(table, std=0.02)

    def patchify(self, latents: Shaped[Tensor, "B C H W"]) -> Float[Tensor, "B L D"]:
        """Cut latents into this model's tokens. Raises ValueError if they are not what it takes."""
        expected = (self.vae_embed_dim, self.seq_h * self.patch_size, self.seq_w * self.patch_size)
        if latents.shape[1:] != expected:
            raise ValueError(
                f"expected latents (B, {', '.join(map(str, expected))}), got "
                f"{tuple(latents.shape)}; encode, crop or resize to what the model was built for"
            )
        if not latents.is_floating_point():
            raise ValueError(f"latents are {latents.dtype}; expected float (see data.normalise)")
        return tokens.patchify(latents, self.patch_size)

    def unpatchify(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B C H W"]:
        """Put tokens together to latents."""
        return tokens.unpatchify(x, self.patch_size, (self.seq_h, self.seq_w))

    def class_embedding(self, labels: Int[Tensor, " B"]) -> Float[Tensor, "B D"]:
        """Look up a vector for each label; the fake latent for the label -1."""
        embedded = self.class_emb(labels.clamp(min=0))  # (B, D)
        return torch.where((labels == NO_CLASS)[:, None], self.fake_latent, embedded)

    def forward_encoder(
        self, x: Float[Tensor, "B L C"], mask: Bool[Tensor, "B L"], labels: Tensor, num_masked=None
    ) -> Float[Tensor, "B S D"]:
        """Encode the known tokens, with the class in the buffer tokens in front of them.

        mask        True = masked, the same number in each row; x is never used there
        num_masked  that number; counted if None, with a ValueError where rows differ
        """
        known = None if num_masked is None else mask.shape[1] - num_masked
        places = masking.positions(~mask, known)  # (B, K)
        x = torch.cat([self.embed_buffer(labels), self.embed(x, places)], dim=1)  # (B, S, D)
        return self.encoder_norm(self.run(self.encoder_blocks, self.z_proj_ln(x)))

    def embed(self, x: Tensor, places: Int[Tensor, "B K"]) -> Float[Tensor, "B K D"]:
        """Project the tokens at those places, and add their positions."""
        x = self.z_proj(take(x, places).to(self.z_proj.weight.dtype))  # (B, K, D)
        return x + take(self.encoder_pos_embed_learned[:, self.buffer_size :], places)

    def embed_buffer(self, labels: Int[Tensor, " B"]) -> Float[Tensor, "B N D"]:
        """Build the buffer tokens: the class in each, with their positions."""
        buffer = self.class_embedding(labels)[:, None]  # (B, 1, D)
        return buffer + self.encoder_pos_embed_learned[:, : self.buffer_size]

    def forward_decoder(
        self, x: Float[Tensor, "B S D"], mask: Bool[Tensor, "B L"], wanted=None, num_wanted=None
    ) -> Float[Tensor, "B M E"]:
        """Put a mask token where a token is missing; compute z, the head's condition.

        x           from `forward_encoder` under the same mask
        wanted      (B, L) bool, True = z is needed there, the same number in each row; all if None
        num_wanted  that number; counted if None
        """
        known = x.shape[1] - self.buffer_size
        if num_wanted is None and masking.same_count(~mask) != known:
            raise ValueError(f"x is of {known} known tokens; expected those of the encoder's mask")
        x = self.decoder_embed(x)  # (B, S, E)
        buffer, x = x[:, : self.buffer_size], x[:, self.buffer_size :]
        full = masking.restore(x, mask, self.mask_token)  # (B, L, E)
        x = torch.cat([buffer, full], dim=1) + self.decoder_pos_embed_learned
        if wanted is None:
            wanted, num_wanted = torch.ones_like(mask), self.seq_len
        places = masking.positions(wanted, num_wanted)  # (B, M)
        x = self.run(self.decoder_blocks, x, places + self.buffer_size)  # (B, M, E)
        return self.decoder_norm(x) + take(self.diffusion_pos_embed_learned, places)

    def run(self, blocks: nn.ModuleList, x: Tensor, rows=None) -> Float[Tensor, "B K D"]:
        """Apply all blocks in turn; then take the given rows (B, K) int64, or all."""
        at_the_last = ()  # its `forward` may compute those rows only, as that of `Block` does
        if rows is not None and blocks and "rows" in signature(blocks[-1].forward).parameters:
            at_the_last, rows = (rows,), None
        for i, block in enumerate(blocks, start=1):
            wanted = at_the_last if i == len(blocks) else ()
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, *wanted, use_reentrant=False)
            else:
                x = block(x, *wanted)
        return x if rows is None else take(x, rows)

    def forward(self, latents, labels, drawn=None, *, generator=None, return_terms=False):
        """Compute the training loss: hide tokens, predict each from the rest (MAR section 3.4).

        latents       (B, C, H, W) float, scaled to standard deviation 1 (pixels: in [-1, 1])
        labels        (B,) int64, -1 = no class; in training some more are dropped
        drawn         all that is random, from `draw`; drawn from the generator if None
        return_terms  give all of the head's terms by name instead of the loss alone

        Raises ValueError for latents or labels that do not fit the model.
        """
        x = self.patchify(latents)  # (B, L, C)
        labels = check_labels(labels, self.class_num, len(x))  # (B,)
        if drawn is None:
            drawn = self.draw(len(x), generator)
        mask, num_masked = drawn.mask.to(x.device), drawn.num_masked  # (B, L), M
        labels = labels.masked_fill(drawn.dropped.to(labels.device), NO_CLASS)
        target = masking.keep(x, mask, num_masked).flatten(0, 1)  # (B * M, C)

        # encoder, decoder
        x = self.forward_encoder(x, mask, labels, num_masked)  # (B, S, D)
        z = self.forward_decoder(x, mask, mask, num_masked).flatten(0, 1)  # (B * M, E)

        # head
        head = self.diffloss.terms if return_terms else self.diffloss
        repeat, given = self.diffusion_batch_mul, {"t": drawn.t, "noise": drawn.noise}
        return head(target, z, repeat=repeat, **given, generator=generator)

    def draw(self, batch_size, generator=None, *, mask=None, t=None, noise=None) -> StepDraws:
        """Draw everything random in a training step that is not given.

        mask      (B, L) bool; else a ratio for the batch, and an order for each image
        t, noise  of diffusion_batch_mul * B * L rows: also those of tokens that are not masked
        """
        if mask is None:
            mask = self.draw_mask(batch_size, generator)
        elif mask.shape != (batch_size, self.seq_len) or not mask.any():
            raise ValueError(
                f"the mask is {tuple(mask.shape)} and hides {int(mask.sum())} tokens; expected "
                f"{(batch_size, self.seq_len)}, with one hidden token at least"
            )
        num_masked, repeat = masking.same_count(mask), self.diffusion_batch_mul
        dropped = self.draw_dropped(batch_size, generator)
        for name, given in (("t", t), ("noise", noise)):
            if given is not None and len(given) != repeat * mask.numel():
                want = f"diffusion_batch_mul * B * L = {repeat * mask.numel()}"
                raise ValueError(f"{name} has {len(given)} rows; expected {want}")
        t, noise = (masked_rows(x, mask, repeat) for x in (t, noise))
        t, noise = self.diffloss.draw(repeat * batch_size * num_masked, generator, t, noise)
        return StepDraws(mask, num_masked, dropped, t, noise)

    def draw_mask(self, batch_size: int, generator=None) -> Bool[Tensor, "B L"]:
        """Draw a training mask: one mask ratio for the batch, a random order for each image."""
        ratio = masking.sample_mask_ratio(self.mask_ratio_min, generator)
        order = masking.random(self.seq_h, self.seq_w, batch_size, generator)
        return masking.mask_by_order(order, math.ceil(self.seq_len * ratio))

    def draw_dropped(self, batch_size: int, generator=None) -> Bool[Tensor, " B"]:
        """Draw whose label is left out: the model also learns to do without. None in `eval`."""
        device = "cpu" if generator is None else generator.device
        if not (self.training and self.label_drop_prob > 0):
            return torch.zeros(batch_size, dtype=torch.bool, device=device)
        return torch.rand(batch_size, generator=generator, device=device) < self.label_drop_prob


def check_labels(labels, class_num: int, batch_size: int | None = None) -> Int[Tensor, " B"]:
    """Return labels as int64, each -1 (no class) to class_num - 1, or raise ValueError."""
    kind = "expected whole numbers (int64), the index of a class"
    try:
        labels = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"labels are {labels!r}; {kind}") from error
    if not labels.numel():
        raise ValueError("there are no labels; expected one or more")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels are {labels.dtype}; {kind}")
    if labels.ndim != 1 or batch_size not in (None, len(labels)):
        got, want = tuple(labels.shape), "B" if batch_size is None else batch_size
        raise ValueError(f"labels have shape {got}; expected ({want},), one for each image")
    labels = labels.long()
    bad = labels[(labels < NO_CLASS) | (labels >= class_num)]
    if len(bad):
        first, last = int(bad[0]), class_num - 1
        raise ValueError(f"label {first} is out of range; expected 0 to {last}, or -1 for none")
    return labels
