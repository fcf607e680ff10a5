"""Shapes and types in annotations are enforced while testing, and only then."""

import os
import sys

import pytest
import torch
from jaxtyping import install_import_hook

assert "mar_mini" not in sys.modules, "imported before its annotations could be enforced"
HOOK = install_import_hook("mar_mini", "typecheck.checker")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need the network


@pytest.fixture(autouse=True)
def seeded():
    """Each test starts from the same global random state."""
    torch.manual_seed(0)
