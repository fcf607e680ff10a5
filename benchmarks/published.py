"""The computation as published, in plain eager PyTorch, on the same weights.

Nothing here is a bad version of anything. It is what one writes first, and what the published code
of MAR does: the loss of all tokens, masked afterwards; the condition embedded once for each
repetition; the library's fused attention; tables looked up anew at each step; every row of the
decoder computed. Each class takes the place of one part of `mar_mini`, with the same parameter
names, so that the parts can be exchanged one by one (`speed.py`, the ladder).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mar_mini import masking, sampling, transformer, vae
from mar_mini.diffloss import DiffLoss
from mar_mini.diffusion import NUM_TIMESTEPS, Diffusion
from mar_mini.mar import MAR, NO_CLASS


class PublishedAttention(transformer.Attention):
    """The library's fused attention, dropout included."""

    def forward(self, x: Tensor) -> Tensor:
        B, N, D = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.attn_drop.p if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        return F.dropout(
            self.proj(x.transpose(1, 2).reshape(B, N, D)), self.proj_drop.p, self.training
        )


class PublishedBlock(transformer.Block):
    """A pre-norm block with the library's dropout after each of its layers."""

    def __init__(self, dim, num_heads, mlp_ratio=4.0, attn_dropout=0.0, proj_dropout=0.0):
        super().__init__(dim, num_heads, mlp_ratio, attn_dropout, proj_dropout)
        self.attn = PublishedAttention(dim, num_heads, attn_dropout, proj_dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        dropout, mlp = self.mlp.drop1.p, self.mlp
        h = F.dropout(F.gelu(mlp.fc1(self.norm2(x))), dropout, self.training)
        return x + F.dropout(mlp.fc2(h), dropout, self.training)


class PublishedHead(DiffLoss):
    """The diffusion head on every row it is given, step by step from nothing."""

    def denoise(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        net = self.net
        x = net.input_proj(x)
        y = net.time_embed(t) + net.cond_embed(z)
        for block in net.res_blocks:
            shift, scale, gate = block.adaLN_modulation(y).chunk(3, dim=-1)
            x = x + gate * block.mlp(block.in_ln(x) * (1 + scale) + shift)
        final = net.final_layer
        shift, scale = final.adaLN_modulation(y).chunk(2, dim=-1)
        return final.linear(final.norm_final(x) * (1 + scale) + shift)

    def terms(self, target, z, mask=None, *, repeat=1, t=None, noise=None, generator=None):
        target, z = target.repeat(repeat, 1), z.repeat(repeat, 1)
        if t is None:
            t = torch.randint(NUM_TIMESTEPS, target.shape[:1], generator=generator)
            t = t.to(target.device)
        if noise is None:
            noise = torch.randn(target.shape, generator=generator).to(target)
        diffusion = self.diffusion
        x_t = diffusion.q_sample(target, t, noise)
        rows = diffusion.loss(self.denoise(x_t, t, z), target, x_t, t, noise)
        if mask is None:
            return {name: value.mean() for name, value in rows.items()}
        weight = mask.float()
        return {name: (value * weight).sum() / weight.sum() for name, value in rows.items()}

    def sample(
        self,
        z,
        z_uncond=None,
        *,
        cfg=1.0,
        temperature=1.0,
        clip=None,
        num_sampling_steps=None,
        solver="ddpm",
        generator=None,
    ):
        """Under guidance both halves of the batch go through every line."""
        diffusion = Diffusion(num_sampling_steps or self.num_sampling_steps)
        n = len(z)
        x = torch.randn(n, self.target_channels, generator=generator).to(z.device)
        if z_uncond is not None:
            x, z = torch.cat([x, x]), torch.cat([z, z_uncond])
        for step in reversed(range(diffusion.num_steps)):
            t = torch.full((len(x),), step, device=x.device)
            original = diffusion.timestep_map.to(x.device)[t]
            if z_uncond is None:
                output = self.denoise(x, original, z)
            else:
                output = self.denoise(torch.cat([x[:n], x[:n]]), original, z)
                noise, v = output.chunk(2, dim=1)
                cond, uncond = noise.chunk(2)
                guided = uncond + cfg * (cond - uncond)
                output = torch.cat([torch.cat([guided, guided]), v], dim=1)
            x = diffusion.p_sample(output, x, t, torch.randn_like(x), temperature, clip)
        return x[:n].float()


class PublishedMAR(MAR):
    """The transformer and the loss on all tokens; rows are picked by boolean masks."""

    def forward_encoder(self, x: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        B, _, _ = x.shape
        x = self.z_proj(x)
        x = torch.cat([x.new_zeros(B, self.buffer_size, x.shape[-1]), x], dim=1)
        known = F.pad(~mask, (self.buffer_size, 0), value=True)
        embedded = self.class_emb(labels.clamp(min=0))
        dropped = (labels == NO_CLASS)[:, None].to(embedded)
        embedded = dropped * self.fake_latent + (1 - dropped) * embedded
        x[:, : self.buffer_size] = embedded[:, None].to(x)
        x = self.z_proj_ln(x + self.encoder_pos_embed_learned)
        x = x[known.nonzero(as_tuple=True)].reshape(B, -1, x.shape[-1])
        for block in self.encoder_blocks:
            x = block(x)
        return self.encoder_norm(x)

    def forward_decoder(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.decoder_embed(x)
        known = F.pad(~mask, (self.buffer_size, 0), value=True)
        full = self.mask_token.repeat(*known.shape, 1).to(x.dtype)
        full[known.nonzero(as_tuple=True)] = x.reshape(-1, x.shape[-1])
        x = full + self.decoder_pos_embed_learned
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_norm(x)[:, self.buffer_size :] + self.diffusion_pos_embed_learned

    def forward(
        self, latents, labels, *, mask=None, t=None, noise=None, generator=None, return_terms=False
    ):
        target = self.patchify(latents)
        if mask is None:
            mask = self.draw_mask(len(target), generator).to(target.device)
        dropped = self.draw_dropped(len(target), generator).to(labels.device)
        labels = labels.masked_fill(dropped, NO_CLASS)
        z = self.forward_decoder(self.forward_encoder(target, mask, labels), mask)
        repeat = self.diffusion_batch_mul
        terms = self.diffloss.terms(
            target.flatten(0, 1).repeat(repeat, 1),
            z.flatten(0, 1).repeat(repeat, 1),
            mask.flatten().repeat(repeat),
            t=t,
            noise=noise,
            generator=generator,
        )
        return terms if return_terms else terms["loss"]


@torch.no_grad()
def generate(
    model: MAR,
    labels: Tensor,
    *,
    num_iter: int,
    cfg: float,
    num_sampling_steps: int,
    generator: torch.Generator,
    temperature: float = 1.0,
    clip: float | None = None,
) -> Tensor:
    """Tokens (B, L, C) after all iterations: encoder, decoder and head on the doubled batch."""
    model.eval()
    B, L = len(labels), model.seq_len
    device = model.fake_latent.device
    order = masking.random(model.seq_h, model.seq_w, B, generator).to(device)
    tokens = torch.zeros(B, L, model.token_embed_dim, device=device)
    mask = torch.ones(B, L, dtype=torch.bool, device=device)
    both = torch.cat([labels, torch.full_like(labels, NO_CLASS)])
    for num_masked in masking.masked_after(L, num_iter):
        doubled = torch.cat([mask, mask])
        x = model.forward_encoder(torch.cat([tokens, tokens]), doubled, both)
        z = model.forward_decoder(x, doubled)
        still = masking.mask_by_order(order, num_masked)
        predicted = mask ^ still
        weight = sampling.linear_cfg(cfg, max(1, num_masked), L)
        z = z[torch.cat([predicted, predicted]).nonzero(as_tuple=True)]
        drawn = model.diffloss.sample(
            *z.chunk(2),
            cfg=weight,
            temperature=temperature,
            clip=clip,
            num_sampling_steps=num_sampling_steps,
            generator=generator,
        )
        tokens = tokens.clone()
        tokens[predicted.nonzero(as_tuple=True)] = drawn
        mask = still
    return tokens


class PublishedTraining:
    """One training step after the other: AdamW, clipping and average, parameter by parameter."""

    def __init__(self, model: nn.Module, learning_rate: float = 8e-4):
        self.model, self.ema = model, [p.detach().clone() for p in model.parameters()]
        self.optimiser = torch.optim.AdamW(
            model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.02
        )

    def step(self, loss: Tensor) -> float:
        self.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 3.0, foreach=False)
        self.optimiser.step()
        with torch.no_grad():
            for averaged, parameter in zip(self.ema, self.model.parameters(), strict=True):
                averaged.mul_(0.9999).add_(parameter, alpha=1 - 0.9999)
        return loss.item()


class PublishedUpsample(vae.Upsample):
    """Repeat each value, then convolve the larger image."""

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class PublishedResnetBlock(vae.ResnetBlock):
    """SiLU in two steps."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        h = self.conv1(h * torch.sigmoid(h))
        h = self.norm2(h)
        h = self.conv2(self.dropout(h * torch.sigmoid(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class PublishedAttnBlock(vae.AttnBlock):
    """The attention product written out."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (f(h).flatten(2) for f in (self.q, self.k, self.v))  # 3 x (B, C, HW)
        weights = torch.softmax(torch.bmm(q.mT, k) * x.shape[1] ** -0.5, dim=2)
        return x + self.proj_out(torch.bmm(v, weights.mT).reshape(x.shape))


def published_vae(model: vae.AutoencoderKL) -> vae.AutoencoderKL:
    """The same autoencoder, on the same weights, with those parts."""
    for part in (PublishedUpsample, PublishedResnetBlock, PublishedAttnBlock):
        for module in model.modules():
            if type(module) is part.__base__:
                module.__class__ = part
    return model
