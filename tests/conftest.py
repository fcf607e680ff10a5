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
APART = ("test_chapters", "test_premises")  # their tests share nothing: each is a piece of work


def pytest_xdist_make_scheduler(config, log):
    """Gives a worker a whole file at once, since its tests share what they train."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return nodeid if file.endswith(tuple(f"/{name}.py" for name in APART)) else file

    return Scheduling(config, log)


def pytest_collection_modifyitems(config, items):
    """Several workers begin with what takes longest; alone, one takes tests as they stand."""

    def rank(item):
        place = LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST)
        return not item.get_closest_marker("slow"), place

    if hasattr(config, "workerinput"):
        items.sort(key=rank)


@pytest.fixture(autouse=True)
def seeded():
    """Each test starts from the same global random state."""
    torch.manual_seed(0)
