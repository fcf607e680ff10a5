"""Shapes and types in annotations are enforced while testing, and only then."""

import os
import sys

import pytest
import torch
from jaxtyping import install_import_hook

assert "mar_mini" not in sys.modules, "imported before its annotations could be enforced"
HOOK = install_import_hook("mar_mini", "typecheck.checker")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need the network
# where the longest are; a worker that ends with one of them leaves the others idle
LONGEST = ("test_chapters", "test_pages", "test_learning", "test_premises", "test_symptoms")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """What a worker takes at once: one slow test, or all quick ones of a file; slow ones first.

    A file whose slow tests share a fixture keeps them together by a mark of its own.
    """
    if not getattr(
        config.option, "loadgroup", False
    ):  # in one process the order in the file is best
        return
    for item in items:
        if not item.get_closest_marker("slow") and not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.nodeid.split("::")[0]))

    def rank(item):
        place = LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST)
        return not item.get_closest_marker("slow"), place

    items.sort(key=rank)


@pytest.fixture(autouse=True)
def seeded():
    """Each test starts from the same global random state."""
    torch.manual_seed(0)
