"""Shapes and types in annotations are enforced while testing, and only then."""

import os
import sys

import pytest
import torch
from jaxtyping import install_import_hook

assert "mar_mini" not in sys.modules, "imported before its annotations could be enforced"
HOOK = install_import_hook("mar_mini", "typecheck.checker")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need the network
# files with the longest tests; begun last, one of them would leave the other workers idle
LONGEST = ("test_chapters", "test_pages", "test_learning", "test_distributed", "test_premises")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Says what a worker takes at once, a slow test or the rest of a file, the longest first."""
    if not getattr(config.option, "loadgroup", False):  # alone, a process takes them as they stand
        return
    for item in items:
        fixtures = item._fixtureinfo.name2fixturedefs.values()
        shares = any(definitions[-1].scope == "module" for definitions in fixtures)
        if shares or not item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.xdist_group(item.nodeid.split("::")[0]))

    def rank(item):
        place = LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST)
        return not item.get_closest_marker("slow"), place

    items.sort(key=rank)


@pytest.fixture(autouse=True)
def seeded():
    """Each test starts from the same global random state."""
    torch.manual_seed(0)
