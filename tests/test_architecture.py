"""The house: the model is 14 files in order, rooms look at it and it never looks at them."""

import ast
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
PACKAGE = REPO / "mar_mini"
CORE = (
    "configs data tokens vae diffusion diffloss transformer masking mar sampling training "
    "checkpoints evaluation files"
).split()
ROOMS = "run judge fast planner course".split()
LINES = {"core": 2720, "file": 320, "package": 7270}  # never more than today


def modules() -> dict[str, Path]:
    """Dotted name within the package -> file."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(path: Path, everywhere: bool = False) -> set[str]:
    """The package's modules that a file imports: when it is imported, or everywhere in it."""
    tree = ast.parse(path.read_text("utf-8"))
    nodes = ast.walk(tree) if everywhere else (n for n in tree.body if not isinstance(n, ast.If))
    found = set()
    for node in nodes:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            package, _, inner = name.partition(".")
            if package == "mar_mini" and inner and inner in MODULES:
                found.add(inner)
    return found


def room(module: str) -> str:
    return module.split(".")[0]


def lines(paths) -> int:
    return sum(len(path.read_text("utf-8").splitlines()) for path in paths)


def test_the_model_is_what_one_sees_first():
    files = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__", "cli"}
    assert files == set(CORE)
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name[0] != "_"}
    assert folders == {*ROOMS, "checks", "viz"}
    page = (REPO / "docs" / "architecture.md").read_text("utf-8")
    named = [*(f"`{name}.py`" for name in CORE), *(f"`{name}/`" for name in folders)]
    assert not [name for name in named if name not in page]


def test_it_can_be_read_in_an_evening():
    core = [PACKAGE / f"{name}.py" for name in CORE]
    assert {path.name: n for path in core if (n := lines([path])) > LINES["file"]} == {}
    assert lines(core) <= LINES["core"]
    others = [p for name, p in MODULES.items() if room(name) not in ("checks", "viz")]
    assert lines(others) <= LINES["package"]


@pytest.mark.parametrize("module", CORE)
def test_the_model_never_looks_at_a_room(module):
    found = imports(MODULES[module], everywhere=True)
    assert found <= set(CORE), f"{module} imports {found - set(CORE)}"


def test_rooms_reach_for_checks_and_pictures_only_when_they_run():
    for name, path in MODULES.items():
        if room(name) in ROOMS:
            assert not {x for x in imports(path) if room(x) in ("checks", "viz")}, name


def test_there_is_no_circle():
    """Every module can be put behind those that it imports."""
    left = {name: imports(path) - {name} for name, path in MODULES.items()}
    # a package's __init__ is there as soon as one of its modules is asked for
    left = {
        name: {x for x in needs if not name.startswith(f"{x}.")} for name, needs in left.items()
    }
    while left:
        ready = {name for name, needs in left.items() if not needs & left.keys()}
        assert ready, f"these import each other: {left}"
        left = {name: needs for name, needs in left.items() if name not in ready}
