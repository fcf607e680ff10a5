"""The KL autoencoder: image <-> latent (Rombach et al. 2022; MAR section 4, "KL-16").

Names and shapes are those of the published weights, so that `kl16` loads them without renaming.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from jaxtyping import Float
from torch import Tensor, nn


class DiagonalGaussian:
    """One independent normal distribution for each latent value.

    moments  (B, 2C, H, W): the means, then the log variances (clamped to [-30, 20])
    """

    def __init__(self, moments: Float[Tensor, "B C2 H W"]):
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)

    def sample(self, generator: torch.Generator | None = None) -> Float[Tensor, "B C H W"]:
        """Draw mean + std * noise, differentiable in both (Kingma & Welling 2014, section 2.4)."""
        return self.mean + torch.exp(0.5 * self.logvar) * randn_like(self.mean, generator)

    def mode(self) -> Float[Tensor, "B C H W"]:
        """The most likely latent: the mean."""
        return self.mean

    def kl(self) -> Float[Tensor, " B"]:
        """KL divergence from the standard normal in nats, summed over C, H and W."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1.0 - self.logvar).sum(dim=(1, 2, 3))


def latent_scale(latents: Float[Tensor, "N C H W"]) -> float:
    """The factor that gives latents a standard deviation of 1, over all of their values at once.

    No mean is subtracted. For the published KL-16 over its training set it is 0.2325.
    """
    return 1.0 / float(latents.std())


def randn_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal noise like x, drawn on the generator's device."""
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)


def norm(channels: int, num_groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, num_groups: int, dropout: float = 0.0):
        super().__init__()
        self.norm1 = norm(in_channels, num_groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = norm(out_channels, num_groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:  # (B, C_in, H, W)
        h = self.conv1(F.silu(self.norm1(x)))  # (B, C_out, H, W)
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))  # (B, C_out, H, W)
        shortcut = self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x
        return shortcut + h  # (B, C_out, H, W)


class AttnBlock(nn.Module):
    """Self-attention of one head over all H * W places of a feature map."""

    def __init__(self, channels: int, num_groups: int):
        super().__init__()
        self.norm = norm(channels, num_groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W)
        h = self.norm(x)  # (B, C, H, W)
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
    """Double the resolution by repeating each value, then smooth with a 3x3 convolution.

    Both at once: among the 3x3 places around a new value only 2x2 old ones are different, so the
    kernel's entries that meet the same old value are added first. That is a transposed convolution
    with a kernel of 4x4, and 4 products for each new value instead of 9.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        w = self.conv.weight  # (C, C, 3, 3)
        shifts = ((1, 0, 1, 0), (0, 1, 1, 0), (1, 0, 0, 1), (0, 1, 0, 1))
        kernel = sum(F.pad(w, shift) for shift in shifts)  # (C, C, 4, 4)
        kernel = kernel.flip(2, 3).transpose(0, 1)
        return F.conv_transpose2d(x, kernel, self.conv.bias, stride=2, padding=1)


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
    """All residual blocks of one resolution, each with attention behind it where asked for."""

    def __init__(
        self, in_channels: int, out_channels: int, num_blocks: int, attention: bool, num_groups: int
    ):
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.block = nn.ModuleList(ResnetBlock(a, b, num_groups) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(
            AttnBlock(out_channels, num_groups) for _ in range(num_blocks if attention else 0)
        )

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        for resample in ("downsample", "upsample"):
            if hasattr(self, resample):
                x = getattr(self, resample)(x)
        return x


class Encoder(nn.Module):
    def __init__(
        self,
        ch,
        ch_mult,
        num_res_blocks,
        attn_resolutions,
        resolution,
        in_channels,
        z_channels,
        num_groups,
    ):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.ModuleList()
        width = ch
        for i, mult in enumerate(ch_mult):
            attention = resolution // 2**i in attn_resolutions
            level = Level(width, ch * mult, num_res_blocks, attention, num_groups)
            width = ch * mult
            if i < len(ch_mult) - 1:
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = Middle(width, num_groups)
        self.norm_out = norm(width, num_groups)
        self.conv_out = nn.Conv2d(width, 2 * z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, H, W)
        x = self.conv_in(x)  # (B, ch, H, W)
        for level in self.down:
            x = level(x)  # (B, ch * mult, H / 2, W / 2) ...
        x = self.mid(x)  # (B, width, h, w)
        return self.conv_out(F.silu(self.norm_out(x)))  # (B, 2 * z_channels, h, w)


class Decoder(nn.Module):
    """The encoder backwards, with one residual block more on each level and no attention there."""

    def __init__(self, ch, ch_mult, num_res_blocks, out_channels, z_channels, num_groups):
        super().__init__()
        width = ch * ch_mult[-1]
        self.conv_in = nn.Conv2d(z_channels, width, 3, padding=1)
        self.mid = Middle(width, num_groups)
        levels = []
        for i, mult in reversed(list(enumerate(ch_mult))):
            level = Level(width, ch * mult, num_res_blocks + 1, False, num_groups)
            width = ch * mult
            if i > 0:
                level.upsample = Upsample(width)
            levels.append(level)
        self.up = nn.ModuleList(reversed(levels))  # up[0] is the full resolution, and runs last
        self.norm_out = norm(width, num_groups)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:  # (B, z_channels, h, w)
        x = self.mid(self.conv_in(z))  # (B, width, h, w)
        for level in reversed(self.up):
            x = level(x)  # (B, ch * mult, 2h, 2w) ...
        return self.conv_out(F.silu(self.norm_out(x)))  # (B, 3, H, W)


class AutoencoderKL(nn.Module, PyTorchModelHubMixin):
    """Variational autoencoder whose latents are what MAR generates.

    ch                width of the first level; level i has ch * ch_mult[i] channels
    ch_mult           one factor a level; each level but the last halves the resolution
    num_res_blocks    residual blocks a level in the encoder (the decoder has one more)
    attn_resolutions  resolutions at which the encoder's levels have attention
    resolution        side of the training images, in pixels (only decides where attention goes)
    z_channels        channels of the latent
    in_channels       channels of the image
    num_groups        groups of every GroupNorm (32 in the published model)
    linear_path       a linear map of patches beside encoder and decoder, which then learn what it
                      lacks: many times quicker to train, and not in the published model (compare
                      the shortcuts of Chen et al. 2024, "Deep compression autoencoder")

    Raises ValueError if `num_groups` does not divide a level's width or the resolution cannot be
    halved often enough. Source: MAR section 4; the architecture of Rombach et al. 2022.
    """

    def __init__(
        self,
        ch: int = 128,
        ch_mult: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        attn_resolutions: Sequence[int] = (16,),
        resolution: int = 256,
        z_channels: int = 16,
        in_channels: int = 3,
        num_groups: int = 32,
        linear_path: bool = False,
    ):
        super().__init__()
        odd = [ch * m for m in ch_mult if ch * m % num_groups]
        if odd:
            raise ValueError(
                f"num_groups {num_groups} does not divide a level's {odd[0]} channels; "
                "choose num_groups so that it divides ch * every ch_mult"
            )
        self.stride = 2 ** (len(ch_mult) - 1)
        if resolution % self.stride:
            raise ValueError(
                f"resolution {resolution} is not a multiple of 2^(levels - 1) = {self.stride}; "
                "use fewer levels in ch_mult or another resolution"
            )
        self.in_channels, self.z_channels = in_channels, z_channels
        self.encoder = Encoder(
            ch,
            ch_mult,
            num_res_blocks,
            attn_resolutions,
            resolution,
            in_channels,
            z_channels,
            num_groups,
        )
        self.decoder = Decoder(ch, ch_mult, num_res_blocks, in_channels, z_channels, num_groups)
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * z_channels, 1)
        self.post_quant_conv = nn.Conv2d(z_channels, z_channels, 1)
        self.linear_path = linear_path
        if linear_path:
            side = self.stride
            self.linear_in = nn.Conv2d(in_channels, z_channels, side, side, bias=False)
            self.linear_out = nn.ConvTranspose2d(z_channels, in_channels, side, side, bias=False)

    @torch.no_grad()
    def start_linear(
        self, images: Float[Tensor, "B C H W"], whitening: float = 0.5, log_variance: float = -5.0
    ) -> None:
        """Set the linear path to the principal components of patches, all else to add nothing.

        images        (B, in_channels, H, W) float in [-1, 1], some of the training set
        whitening     1: all components get the same spread, 0: each keeps its own, which differ by
                      a factor of 20 and more
        log_variance  of every latent value; the latents get a standard deviation of about 1

        What the untrained model then reconstructs is the best that any linear map can do with
        `z_channels` numbers a patch. Raises ValueError if the model has no linear path.
        """
        if not self.linear_path:
            raise ValueError("this model has no linear path; build it with linear_path=True")
        patches = F.unfold(images, self.stride, stride=self.stride)  # (B, P, L)
        patches = patches.transpose(1, 2).flatten(0, 1)  # (B * L, P)
        second_moment = patches.T @ patches / len(patches)  # (P, P)
        axes = torch.linalg.eigh(second_moment).eigenvectors  # smallest first
        axes = axes[:, -self.z_channels :].T  # (C, P)
        spread = (patches @ axes.T).std(0) ** whitening  # (C,)
        scale = spread * (patches @ axes.T / spread).std()
        self.linear_in.weight.copy_((axes / scale[:, None]).view_as(self.linear_in.weight))
        self.linear_out.weight.copy_((axes * scale[:, None]).view_as(self.linear_out.weight))
        for layer in (self.quant_conv, self.decoder.conv_out):
            layer.weight.zero_()
            layer.bias.zero_()
        self.quant_conv.bias[self.z_channels :] = log_variance

    def encode(self, images: Float[Tensor, "B C H W"]) -> DiagonalGaussian:
        """The distribution of the latents of some images.

        images   (B, in_channels, H, W) float in [-1, 1]
        returns  a `DiagonalGaussian` over (B, z_channels, H / stride, W / stride)

        Raises ValueError for another number of channels or a size that does not divide.
        """
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
        """Unscaled latents (B, z_channels, h, w) to images (B, in_channels, H, W)."""
        if latents.shape[1] != self.z_channels:
            raise ValueError(
                f"expected latents (B, {self.z_channels}, h, w), got {tuple(latents.shape)}"
            )
        images = self.decoder(self.post_quant_conv(latents))
        return images + self.linear_out(latents) if self.linear_path else images

    def forward(
        self, images: Float[Tensor, "B C H W"], generator: torch.Generator | None = None
    ) -> tuple[Float[Tensor, "B C H W"], DiagonalGaussian]:
        """Encode, draw a latent, decode: (reconstruction, posterior), as in training."""
        posterior = self.encode(images)
        return self.decode(posterior.sample(generator)), posterior
