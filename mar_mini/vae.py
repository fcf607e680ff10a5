"""The KL autoencoder: image <-> latent (Rombach et al. 2022; MAR section 4, "KL-16").

Names and shapes are those of the published weights, so that `kl16` loads them without renaming.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from jaxtyping import Float
from torch import Tensor, nn

from mar_mini.configs import VAEConfig, from_json


class DiagonalGaussian:
    """One normal distribution a latent value, from means and log variances (clamped)."""

    def __init__(self, moments: Float[Tensor, "B C2 H W"]):
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)

    def sample(self, generator: torch.Generator | None = None) -> Float[Tensor, "B C H W"]:
        """Draw mean + std * noise, differentiable in both (Kingma & Welling 2014, section 2.4)."""
        return self.mean + torch.exp(0.5 * self.logvar) * randn_like(self.mean, generator)

    def mode(self) -> Float[Tensor, "B C H W"]:
        """Give the most likely latent: the mean."""
        return self.mean

    def kl(self) -> Float[Tensor, " B"]:
        """Give the KL divergence from the standard normal in nats, summed over C, H and W."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1.0 - self.logvar).sum(dim=(1, 2, 3))


def latent_scale(latents: Float[Tensor, "N C H W"]) -> float:
    """1 / standard deviation of all latent values at once: 0.2325 for the published KL-16."""
    return 1.0 / float(latents.std())


def randn_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal noise like x, drawn on the generator's device."""
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)


def norm(channels: int, num_groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, num_groups: int):
        super().__init__()
        self.norm1 = norm(in_channels, num_groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = norm(out_channels, num_groups)
        self.dropout = nn.Dropout(0.0)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:  # (B, C_in, H, W)
        h = self.conv1(F.silu(self.norm1(x)))  # (B, C_out, H, W)
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))  # (B, C_out, H, W)
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class AttnBlock(nn.Module):
    """Self-attention with one head over all places of a feature map."""

    def __init__(self, channels: int, num_groups: int):
        super().__init__()
        self.norm = norm(channels, num_groups)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W)
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).mT[:, None] for f in (self.q, self.k, self.v))  # (B, 1, HW, C)
        h = F.scaled_dot_product_attention(q, k, v)  # (B, 1, HW, C)
        return x + self.proj_out(h[:, 0].mT.reshape(x.shape))  # (B, C, H, W)


class Downsample(nn.Module):
    """Halve the resolution; one row and column of zeros go to the right and below only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the resolution by repeating each value, then smooth with a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, num_groups: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, num_groups)
        self.attn_1 = AttnBlock(channels, num_groups)
        self.block_2 = ResnetBlock(channels, channels, num_groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """All residual blocks of one resolution, with attention behind each where asked for."""

    def __init__(self, in_channels, out_channels, num_blocks: int, attention: bool, num_groups):
        super().__init__()
        widths = pairwise([in_channels] + [out_channels] * num_blocks)
        self.block = nn.ModuleList(ResnetBlock(a, b, num_groups) for a, b in widths)
        self.attn = nn.ModuleList()
        if attention:
            self.attn.extend(AttnBlock(out_channels, num_groups) for _ in range(num_blocks))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = self.attn[i](block(x)) if self.attn else block(x)
        # to the next resolution; the last level has neither of the two
        resample = getattr(self, "downsample", None) or getattr(self, "upsample", None)
        return x if resample is None else resample(x)


class Encoder(nn.Module):
    def __init__(self, c: VAEConfig):
        super().__init__()
        self.conv_in = nn.Conv2d(c.in_channels, c.ch, 3, padding=1)
        self.down, width = nn.ModuleList(), c.ch
        for i, mult in enumerate(c.ch_mult):
            attention = c.resolution // 2**i in c.attn_resolutions
            level = Level(width, c.ch * mult, c.num_res_blocks, attention, c.num_groups)
            self.down.append(level)
            width = c.ch * mult
            if i < len(c.ch_mult) - 1:
                level.downsample = Downsample(width)
        self.mid = Middle(width, c.num_groups)
        self.norm_out = norm(width, c.num_groups)
        self.conv_out = nn.Conv2d(width, 2 * c.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, H, W)
        x = self.conv_in(x)  # (B, ch, H, W)
        for level in self.down:
            x = level(x)  # (B, ch * mult, H / 2, W / 2) ...
        x = self.mid(x)  # (B, width, h, w)
        return self.conv_out(F.silu(self.norm_out(x)))  # (B, 2 * z_channels, h, w)


class Decoder(nn.Module):
    """The encoder backwards, with one residual block more on each level and no attention there."""

    def __init__(self, c: VAEConfig):
        super().__init__()
        width, levels = c.ch * c.ch_mult[-1], []
        self.conv_in = nn.Conv2d(c.z_channels, width, 3, padding=1)
        self.mid = Middle(width, c.num_groups)
        for i, mult in reversed(list(enumerate(c.ch_mult))):
            level = Level(width, c.ch * mult, c.num_res_blocks + 1, False, c.num_groups)
            width = c.ch * mult
            if i > 0:
                level.upsample = Upsample(width)
            levels.append(level)
        self.up = nn.ModuleList(reversed(levels))  # up[0] is the full resolution, and runs last
        self.norm_out = norm(width, c.num_groups)
        self.conv_out = nn.Conv2d(width, c.in_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:  # (B, z_channels, h, w)
        x = self.mid(self.conv_in(z))  # (B, width, h, w)
        for level in reversed(self.up):
            x = level(x)  # (B, ch * mult, 2h, 2w) ...
        return self.conv_out(F.silu(self.norm_out(x)))  # (B, 3, H, W)


class AutoencoderKL(nn.Module, PyTorchModelHubMixin):
    """Variational autoencoder whose latents are what MAR generates (MAR section 4).

    settings  the fields of `configs.VAEConfig`; ValueError if they do not fit each other
    """

    def __init__(self, **settings):
        super().__init__()
        c = from_json(VAEConfig, settings)  # as `from_pretrained` has them
        widths = [c.ch * mult for mult in c.ch_mult]
        if any(width % c.num_groups for width in widths):
            raise ValueError(f"num_groups is {c.num_groups}; expected a divisor of widths {widths}")
        self.stride = side = 2 ** (len(widths) - 1)
        if c.resolution % side:
            raise ValueError(f"resolution is {c.resolution}; expected a multiple of {side}")
        self.in_channels, self.z_channels = colours, channels = c.in_channels, c.z_channels
        self.encoder, self.decoder = Encoder(c), Decoder(c)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)
        self.linear_path = c.linear_path
        if c.linear_path:
            self.linear_in = nn.Conv2d(colours, channels, side, side, bias=False)
            self.linear_out = nn.ConvTranspose2d(channels, colours, side, side, bias=False)

    @torch.no_grad()
    def start_linear(self, images: Float[Tensor, "B C H W"], whitening=0.5, log_variance=-5.0):
        """Set the linear path to the principal components of patches, all else to add nothing.

        whitening     1: all components get the same spread, 0: each keeps its own, which differ by
                      a factor of 20 and more
        log_variance  of every latent value; the latents get a standard deviation of about 1

        The untrained model then reconstructs images in [-1, 1] as well as any linear map to
        `z_channels` numbers a patch can. Raises ValueError if the model has no linear path.
        """
        if not self.linear_path:
            raise ValueError("this model has no linear path; build it with linear_path=True")
        patches = F.unfold(images, self.stride, stride=self.stride).mT.flatten(0, 1)  # (B * L, P)
        second_moment = patches.T @ patches / len(patches)  # (P, P)
        axes = torch.linalg.eigh(second_moment).eigenvectors  # smallest first
        axes = axes[:, -self.z_channels :].T  # (C, P)
        spread = (patches @ axes.T).std(0) ** whitening  # (C,)
        scale = spread * (patches @ axes.T / spread).std()
        self.linear_in.weight.copy_((axes / scale[:, None]).view_as(self.linear_in.weight))
        self.linear_out.weight.copy_((axes * scale[:, None]).view_as(self.linear_out.weight))
        for parameter in (*self.quant_conv.parameters(), *self.decoder.conv_out.parameters()):
            parameter.zero_()
        self.quant_conv.bias[self.z_channels :] = log_variance

    def encode(self, images: Float[Tensor, "B C H W"]) -> DiagonalGaussian:
        """Give the distribution of the latents of images in [-1, 1], or raise ValueError."""
        channels, height, width = images.shape[1:]
        if channels != self.in_channels or height % self.stride or width % self.stride:
            raise ValueError(
                f"expected images (B, {self.in_channels}, H, W) with H and W multiples of "
                f"{self.stride}, got {tuple(images.shape)}; convert, crop or pad them"
            )
        moments = self.quant_conv(self.encoder(images))  # (B, 2C, h, w)
        if self.linear_path:
            mean, logvar = moments.chunk(2, dim=1)  # (B, C, h, w) each
            moments = torch.cat([mean + self.linear_in(images), logvar], dim=1)
        return DiagonalGaussian(moments)

    def decode(self, latents: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D H2 W2"]:
        """Turn unscaled latents (B, z_channels, h, w) into images (B, in_channels, H, W)."""
        if latents.shape[1] != self.z_channels:
            got = tuple(latents.shape)
            raise ValueError(f"expected latents (B, {self.z_channels}, h, w), got {got}")
        images = self.decoder(self.post_quant_conv(latents))
        return images + self.linear_out(latents) if self.linear_path else images

    def forward(self, images: Tensor, generator=None) -> tuple[Tensor, DiagonalGaussian]:
        """Encode, draw a latent, decode: (reconstruction, posterior), as in training."""
        posterior = self.encode(images)
        return self.decode(posterior.sample(generator)), posterior
