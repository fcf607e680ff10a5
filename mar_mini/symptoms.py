"""Why are my images black, or noise? A small training with one thing wrong, and what it shows.

`symptoms` trains a tiny MAR in seconds; each of its arguments makes one well-known mistake.
`measure` takes the evidence, of that training or of your own, without knowing what is wrong, and
`diagnose` names the cause.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mar_mini import evaluation
from mar_mini.configs import TrainingConfig
from mar_mini.diffloss import DiffLoss
from mar_mini.diffusion import Diffusion
from mar_mini.mar import MAR
from mar_mini.sampling import evaluating, generate
from mar_mini.training import train_mar

HEALTHY = "healthy"
# what is wrong -> the arguments of `symptoms` that make it so
STATES: dict[str, dict] = {
    HEALTHY: {},
    "unbounded x0": {"clip": None},
    "ema lag": {"ema_window": 1000.0},
    "latent scale": {"latent_scale": 0.1},
    "leaking mask": {"leak": True},
    "no positions": {"positions": False},
    "wide tokens": {"patch_size": 16},
}


@dataclass(frozen=True)
class Evidence:
    """What can be measured on a training whose images are wrong, whatever the cause.

    tokens, token_width  of an image, and values of each
    latent_std           standard deviation of what the model is fed
    largest_x0           largest |x0| in the sampler's first step, as a multiple of the largest
                         value in the training set
    loss                 of the trained weights, on the path that training takes
    loss_hidden          the same masks and noise, but z computed as in sampling: what is hidden is
                         really not there
    loss_average         as `loss`, of the averaged weights
    average_distance     of the averaged weights from the trained ones, relative to these
    z_by_place           how much z differs from place to place when nothing is known, as a share
                         of its size; 0 for a single token
    outside              share of the sampled values beyond 1.05 times the largest training value
    sample_std           standard deviation of the samples, as a multiple of the training set's
    recognised           share of samples taken for the class that was asked for (averaged weights)
    recognised_trained   the same of samples from the trained weights
    """

    tokens: int
    token_width: int
    latent_std: float
    largest_x0: float
    loss: float
    loss_hidden: float
    loss_average: float
    average_distance: float
    z_by_place: float
    outside: float
    sample_std: float
    recognised: float
    recognised_trained: float


@dataclass(frozen=True)
class Symptoms:
    """pictures (N, C, H, W) in [0, 1], sample i of class i modulo the classes; and the evidence."""

    pictures: Tensor
    evidence: Evidence


class Leaking(MAR):
    """A MAR whose mask reaches the loss, but not the encoder: it is shown what it must predict."""

    leaks = False

    def forward(self, *args, **kwargs):
        self.leaks = True
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.leaks = False

    def forward_encoder(self, x, mask, labels):
        return super().forward_encoder(x, mask & (not self.leaks), labels)

    def forward_decoder(self, x, mask, wanted=None):
        return super().forward_decoder(x, mask & (not self.leaks), wanted)


def symptoms(
    latents: Float[Tensor, "N C H W"],
    labels: Int[Tensor, " N"],
    *,
    clip: float | None = 1.0,
    ema_window: float = 0.1,
    latent_scale: float = 1.0,
    leak: bool = False,
    positions: bool = True,
    patch_size: int = 4,
    steps: int = 300,
    seed: int = 0,
    width=64, head_width=128, batch=64, lr=2e-3, depth=1, head_depth=2, precision="auto", buffer=2,
) -> Symptoms:
    side, classes = latents.shape[-1], int(labels.max()) + 1
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = (Leaking if leak else MAR)(
            img_size=side, vae_stride=1, patch_size=patch_size, vae_embed_dim=latents.shape[1],
            class_num=classes, encoder_embed_dim=width, encoder_depth=depth, encoder_num_heads=4,
            decoder_embed_dim=width, decoder_depth=depth, decoder_num_heads=4, buffer_size=buffer,
            attn_dropout=0.0, proj_dropout=0.0, diffloss_d=head_depth, diffloss_w=head_width,
            num_sampling_steps=25, mlp_ratio=2.0,
        )
    if not positions:
        for name, p in model.named_parameters():
            if "pos_embed" in name:
                nn.init.zeros_(p).requires_grad_(False)
    config = TrainingConfig(batch_size=batch, learning_rate=lr, max_steps=steps,
                            ema_window=ema_window, precision=precision)
    scaled = latents * latent_scale
    for step in train_mar(model, scaled, labels, config, seed=seed):
        pass
    return measure(step.model, step.ema, scaled, labels, clip=clip, seed=seed)


def measure(model, ema, latents, labels, clip, seed=0, count=100):
    largest = float(latents.abs().max())
    bound = clip and clip * largest
    classes = model.class_num
    asked = torch.arange(count) % classes
    means = evaluation.class_means(latents, labels)
    gen = lambda: torch.Generator().manual_seed(seed)
    drawn = [m.unpatchify(generate(m, asked, num_iter=min(8, m.seq_len), clip=bound, generator=gen()))
             for m in (ema, model)]
    drawn = [x.nan_to_num(1e9, 1e9, -1e9).clamp(-1e9, 1e9) for x in drawn]
    recognised = [evaluation.recognised(x.clamp(-largest, largest), asked, means) for x in drawn]
    a, b = (torch.cat([p.flatten() for p in m.parameters()]) for m in (ema, model))
    batch, wanted = latents[:512], labels[:512]
    with torch.no_grad(), evaluating(model), evaluating(ema):
        mask = model.draw_mask(len(batch), gen())
        loss, loss_average = (float(m(batch, wanted, mask=mask, generator=gen())) for m in (model, ema))
        tokens = model.patchify(batch)
        x = model.forward_encoder(tokens.masked_fill(mask[..., None], 0), mask, wanted)
        z = model.forward_decoder(x, mask, mask)
        loss_hidden = float(model.diffloss(tokens[mask], z.flatten(0, 1), repeat=model.diffusion_batch_mul, generator=gen()))
        none = torch.ones(count, model.seq_len, dtype=torch.bool)
        z = ema.forward_decoder(ema.forward_encoder(torch.zeros(count, model.seq_len, model.token_embed_dim), none, asked), none)
        spread = float((z - z.mean(1, keepdim=True)).norm() / z.norm())
        z = z.flatten(0, 1)
        d = Diffusion(ema.diffloss.num_sampling_steps)
        x = torch.randn(len(z), model.token_embed_dim, generator=gen())
        last = d.num_steps - 1
        out = ema.diffloss.net(x, d.timestep_map[last].expand(len(x)), z)
        x0 = float(d.p_mean_variance(out, x, last, bound).x0.abs().max()) / largest
    ev = Evidence(model.seq_len, model.token_embed_dim, float(latents.std()), x0, loss, loss_hidden, loss_average,
        float((a - b).norm() / b.norm()), spread, float((drawn[0].abs() > 1.05 * largest).float().mean()),
        float(drawn[0].std() / latents.std()), *recognised)
    return Symptoms((drawn[0] / largest + 1).clamp(0, 2) / 2, ev)
