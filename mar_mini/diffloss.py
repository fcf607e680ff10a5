"""The diffusion head: a small denoising MLP and its loss, p(token | z) (MAR section 3.2, 3.3)."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mar_mini.configs import choose
from mar_mini.diffusion import DETERMINISTIC_START, NUM_TIMESTEPS, SOLVERS, Diffusion, Solver, ddpm
from mar_mini.transformer import LAYER_NORM_EPS

Generators = torch.Generator | Sequence[torch.Generator] | None


def draw_noise(n: int, channels: int, generator: Generators, like: Tensor) -> Tensor:
    """Draw standard normal noise (n, C); each of G generators draws n / G rows of its own."""
    if isinstance(generator, Sequence):
        rows = n // len(generator)
        return torch.cat([draw_noise(rows, channels, g, like) for g in generator])
    device = like.device if generator is None else generator.device
    return torch.randn(n, channels, generator=generator, device=device).to(like)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Shift and scale each channel as the condition says: adaLN (Peebles & Xie 2023, DiT)."""
    return torch.addcmul(x + shift, x, scale)


class TimestepEmbedder(nn.Module):
    """Timesteps as vectors: sinusoids of 128 frequencies, then an MLP."""

    num_sinusoids = 256

    def __init__(self, width: int):
        super().__init__()
        layers = nn.Linear(self.num_sinusoids, width), nn.SiLU(), nn.Linear(width, width)
        self.mlp = nn.Sequential(*layers)

    @classmethod
    def sinusoids(cls, t: Int[Tensor, " N"]) -> Float[Tensor, "N 256"]:
        """Cosines, then sines, of t at frequencies from 1 down to 1/10000."""
        half = cls.num_sinusoids // 2
        k = torch.arange(half, device=t.device, dtype=torch.float32)
        angles = t[:, None].float() * torch.exp(-math.log(10_000) * k / half)
        return torch.cat([angles.cos(), angles.sin()], dim=-1)

    def forward(self, t: Int[Tensor, " N"]) -> Float[Tensor, "N W"]:
        if len(t) > NUM_TIMESTEPS:  # more rows than timesteps: embed each timestep once
            return F.embedding(t, self(torch.arange(NUM_TIMESTEPS, device=t.device)))
        return self.mlp(self.sinusoids(t).to(self.mlp[0].weight.dtype))


class ResBlock(nn.Module):
    """LayerNorm, adaLN, MLP and a gate: one block of the denoising MLP (MAR section 4)."""

    def __init__(self, width: int):
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x: Float[Tensor, "N W"], y: Float[Tensor, "N W"]) -> Float[Tensor, "N W"]:
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)  # 3 x (N, W)
        h = self.mlp(modulate(self.in_ln(x), shift, scale))  # (N, W)
        return torch.addcmul(x, gate, h)  # (N, W)


class FinalLayer(nn.Module):
    def __init__(self, width: int, out_channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=LAYER_NORM_EPS, elementwise_affine=False)
        self.linear = nn.Linear(width, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Float[Tensor, "N W"], y: Float[Tensor, "N W"]) -> Float[Tensor, "N C"]:
        shift, scale = self.adaLN_modulation(y).chunk(2, dim=-1)  # 2 x (N, W)
        return self.linear(modulate(self.norm_final(x), shift, scale))  # (N, C)


class SimpleMLPAdaLN(nn.Module):
    """The denoising MLP: noisy token, timestep and z in; predicted noise and variance out."""

    def __init__(self, channels, width, z_channels, depth, checkpointing=False, block=ResBlock):
        super().__init__()
        self.grad_checkpointing = checkpointing
        self.time_embed = TimestepEmbedder(width)
        self.cond_embed = nn.Linear(z_channels, width)
        self.input_proj = nn.Linear(channels, width)
        self.res_blocks = nn.ModuleList(block(width) for _ in range(depth))
        self.final_layer = FinalLayer(width, 2 * channels)  # noise, then the variance's v
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier for all but the adaLN and output layers, which start at zero: identity blocks."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for layer in (self.time_embed.mlp[0], self.time_embed.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        adaln = [block.adaLN_modulation[-1] for block in self.res_blocks]
        for layer in (*adaln, self.final_layer.adaLN_modulation[-1], self.final_layer.linear):
            nn.init.zeros_(layer.weight)

    def forward(
        self, x: Float[Tensor, "R C"], t: Int[Tensor, " R"], z: Float[Tensor, "N D"]
    ) -> Float[Tensor, "R C2"]:
        """Predict noise and v for tokens x at the original timesteps t; R is a multiple of N."""
        condition = self.cond_embed(z)  # (N, W)
        y = self.time_embed(t).unflatten(0, (-1, len(z))) + condition  # (R / N, N, W)
        return self.denoise(x, y.flatten(0, 1))  # (R, 2C)

    def denoise(self, x: Float[Tensor, "N C"], y: Float[Tensor, "N W"]) -> Float[Tensor, "N C2"]:
        """Run the MLP itself; y is the embedded timestep plus the embedded condition."""
        x = self.input_proj(x)  # (N, W)
        for block in self.res_blocks:
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, y, use_reentrant=False)  # (N, W)
            else:
                x = block(x, y)  # (N, W)
        return self.final_layer(x, y)  # (N, 2C)


def as_steps(net: nn.Module, z: Tensor, timesteps: Tensor) -> Callable[[Tensor, int], Tensor]:
    """Turn net(x, timesteps[i], z) into a function of (x, i), which embeds t and z only once."""
    if type(net).forward is not SimpleMLPAdaLN.forward:  # one's own is called as it is
        return lambda x, i: net(x, timesteps[i].expand(len(x)), z)
    embedded, condition = net.time_embed(timesteps), net.cond_embed(z)  # (T, W), (N, W)
    return lambda x, i: net.denoise(x, embedded[i] + condition)


def guide(output: Float[Tensor, "M C2"], cfg: float) -> Float[Tensor, "N C2"]:
    """Classifier-free guidance of the noise (Ho & Salimans 2022, eq. 6).

    output   conditional rows, then as many unconditional ones
    returns  noise uncond + cfg * (cond - uncond), and the conditional rows' variance
    """
    cond, uncond = output.chunk(2)  # 2 x (N, 2C)
    noise_c, v = cond.chunk(2, dim=1)  # 2 x (N, C)
    noise_u, _ = uncond.chunk(2, dim=1)  # (N, C)
    return torch.cat([noise_u + cfg * (noise_c - noise_u), v], dim=1)


def masked_rows(x: Tensor | None, mask: Tensor, repeat: int) -> Tensor | None:
    """Of the rows of all tokens, repetition-major, those of the masked ones; None stays None."""
    return x if x is None else x.unflatten(0, (repeat, -1))[:, mask.flatten()].flatten(0, 1)


class Head(nn.Module):
    """What MAR expects of a head, p(token | z); one's own writes `forward` and `sample`."""

    def forward(self, target, z, mask=None, **given) -> Float[Tensor, ""]:
        """Compute the loss; arguments as for `DiffLoss.terms`."""
        return self.terms(target, z, mask, **given)["loss"]

    def terms(self, target, z, mask=None, **given) -> dict[str, Tensor]:
        """Compute the loss and what it is made of, by name, scalars."""
        return {"loss": self(target, z, mask, **given)}

    def draw(self, n, generator, t=None, noise=None) -> tuple[Tensor | None, Tensor | None]:
        """Draw t and noise of n rows, where they are not given; None: `forward` draws."""
        return t, noise  # a head that draws here has the same losses in micro batches

    def sample(self, z, z_uncond=None, *, cfg=1.0, **settings) -> Tensor:
        """Draw tokens (N, C) given z (N, D); arguments as for `DiffLoss.sample`."""
        raise NotImplementedError


class DiffLoss(Head):
    """Diffusion loss: p(token | z) as a diffusion model of one token (MAR section 3.2, eq. 1).

    target_channels     C, values of a token
    z_channels          D, width of z
    depth, width        of the denoising MLP
    num_sampling_steps  diffusion steps while sampling, by default
    mlp, settings       of the MLP: `checkpointing`, and `block`, anything called like `ResBlock`
    """

    def __init__(
        self, target_channels, z_channels, depth, width, num_sampling_steps=100, *mlp, **settings
    ):
        super().__init__()
        self.target_channels, self.num_sampling_steps = target_channels, num_sampling_steps
        sizes = (target_channels, width, z_channels, depth)
        self.net = SimpleMLPAdaLN(*sizes, *mlp, **settings)
        self.diffusion = Diffusion()
        Diffusion(num_sampling_steps)  # refuses an impossible number now, not when sampling

    def terms(self, target, z, mask=None, *, repeat=1, t=None, noise=None, generator=None):
        """Compute the loss and its two parts, `mse` and `vb`, as means over the masked tokens.

        target    (N, C) clean tokens; z (N, D) their conditions
        mask      (N,) bool, True = counts; the head does not even look at the others
        repeat    noise levels drawn for each token
        t, noise  (R,) int64 timesteps in [0, 1000) and (R, C) noise of R = repeat * N rows,
                  repetition-major; drawn from `generator` if None
        """
        if mask is not None:
            target, z = target[mask], z[mask]
            t, noise = (masked_rows(x, mask, repeat) for x in (t, noise))
        found = self.token_terms(target, z, repeat=repeat, t=t, noise=noise, generator=generator)
        return {name: value.mean() for name, value in found.items()}

    def token_terms(
        self, target, z, *, repeat=1, t=None, noise=None, generator=None
    ) -> dict[str, Float[Tensor, " R"]]:
        """Compute the loss of each token and noise level and its two parts; see `terms`."""
        target = target.repeat(repeat, 1)  # (R, C)
        t, noise = self.draw(len(target), generator, t, noise)
        t, noise = t.to(target.device), noise.to(target)
        x_t = self.diffusion.q_sample(target, t, noise)  # (R, C)
        output = self.net(x_t, t, z).to(target.dtype)  # (R, 2C)
        return self.diffusion.loss(output, target, x_t, t, noise)

    def draw(self, n, generator, t=None, noise=None) -> tuple[Tensor, Tensor]:
        """Draw timesteps (n,) int64 and noise (n, C) on the generator's device; see `Head.draw`."""
        device = next(self.parameters()).device if generator is None else generator.device
        if t is None:
            t = torch.randint(NUM_TIMESTEPS, (n,), generator=generator, device=device)
        if noise is None:
            noise = torch.randn(n, self.target_channels, generator=generator, device=device)
        return t, noise

    def sample(
        self,
        z: Float[Tensor, "N D"],
        z_uncond: Float[Tensor, "N D"] | None = None,
        *,
        cfg: float = 1.0,
        temperature: float = 1.0,
        clip: float | None = None,
        num_sampling_steps: int | None = None,
        solver: str | Solver = "ddpm",
        generator: Generators = None,
    ) -> Float[Tensor, "N C"]:
        """Draw one token for each z by running the diffusion backwards (MAR section 3.2).

        z_uncond   conditions without class, for guidance only
        generator  one torch.Generator, or a list of G of them for N / G rows each. One draw for
                   the initial state, one for each step but the last

        The further arguments are those of `sampling.sample`.
        """
        walk, diffusion = reverse_walk(solver, num_sampling_steps or self.num_sampling_steps)
        dtype = self.net.input_proj.weight.dtype
        both = z if z_uncond is None else torch.cat([z, z_uncond])  # (N or 2N, D)
        network = as_steps(self.net, both, diffusion.timestep_map.to(z.device))

        def denoise(x: Tensor, t: int) -> Tensor:
            if z_uncond is None:
                return network(x.to(dtype), t).float()  # (N, 2C)
            return guide(network(torch.cat([x, x]).to(dtype), t).float(), cfg)

        def draw() -> Tensor:
            return draw_noise(len(z), self.target_channels, generator, z.new_empty(0).float())

        return walk(denoise, diffusion, draw, temperature, clip)


def reverse_walk(solver: str | Solver, num_steps: int) -> tuple[Solver, Diffusion]:
    """Find a solver by its name, and its timesteps. Raises ValueError if there are none such."""
    walk = choose("solver", solver, SOLVERS)
    last = NUM_TIMESTEPS - 1 if walk is ddpm else DETERMINISTIC_START
    return walk, Diffusion(num_steps, last)
