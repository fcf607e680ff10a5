"""Each chapter runs from its first cell to its last: solved, and as it is handed out."""

import re
from pathlib import Path

import claims
import nbformat
import pytest

from mar_mini.course.chapters import BUDGETS, execute, run_course

REPO = Path(__file__).resolve().parent.parent
STEMS = sorted(
    (path.stem for path in (REPO / "notebooks").glob("[0-9][0-9]_*.ipynb")),
    key=lambda stem: -BUDGETS[stem[:2]],  # the longest first
)
# The long trainings run in full in the solved chapters. As they are handed out, with the same parts
# of the package instead of a learner's, a few steps show that all cells go on; what is claimed of
# the whole training need not hold after them. Chapter -> {regular expression: what stands there}
SHORTER = {
    "00_tour": {r"max_seconds=20\b": "max_seconds=2"},
    "03_diffusion": {r"train\(1200,": "train(120,"},
    "04_diffloss": {"STEPS, EARLY = 1500, 400": "STEPS, EARLY = 150, 40"},
    "07_mar": {
        r"STEPS, MOMENTS = 900, \(1, 50, 150, 300, 500, 900\)": (
            "STEPS, MOMENTS = 45, (1, 5, 10, 15, 30, 45)"
        ),
        r"step == 300\b|\[300\]|\(1, 300, STEPS\)": lambda found: found[0].replace("300", "15"),
        r"\*\*mistake, seed=seed": "**mistake, steps=20, seed=seed",
    },
}
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("stem", STEMS)
def test_a_solved_chapter_passes_its_own_checks(stem, tmp_path):
    """Strictly: a check that does not pass ends it."""
    *_, run = run_course(REPO, tmp_path, [stem])
    assert run.stem == stem and run.finished and run.error is None
    notebook = nbformat.read(run.path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert passed(notebook, "passed") == checked(notebook)
    tagged = any("sample-grid" in cell.metadata.get("tags", []) for cell in code)
    assert (tmp_path / "samples.png").exists() == tagged


@pytest.mark.parametrize("stem", STEMS)
def test_a_chapter_as_it_is_handed_out_goes_on_with_the_packages_parts(stem):
    notebook = nbformat.read(REPO / "notebooks" / f"{stem}.ipynb", as_version=4)
    for cell in shorten(notebook, SHORTER.get(stem, {})):
        cell.metadata["tags"] = [*cell.metadata["tags"], claims.ALLOWED]
    execute(notebook, REPO / "notebooks", strict=False)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert {x.ename for x in outputs if x.output_type == "error"} <= {"AssertionError"}
    goes_on = "not written yet, the notebook goes on with the package's"
    assert passed(notebook, goes_on) == checked(notebook)


def shorten(notebook, changes) -> list:
    """Make a chapter's trainings shorter, and return the claims that come after the first."""
    after, cells = [], [cell for cell in notebook.cells if cell.cell_type == "code"]
    missing = set(changes)
    for cell in cells:
        for pattern, new in changes.items():
            cell.source, count = re.subn(pattern, new, cell.source)
            missing -= {pattern} if count else set()
        if missing != set(changes) and claims.is_claim(cell):
            after.append(cell)
    assert not missing, "the chapter has changed: give the test its new words"
    return after


def checked(notebook) -> list[str]:
    """The names that the chapter's cells give to a check, in order."""
    sources = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    return re.findall(r"^(\w+) = check(?:_\w+)?\.\1\(", sources, re.MULTILINE)


def passed(notebook, words: str) -> list[str]:
    """The names of the lines that the checks printed with these words."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "\n".join(output.get("text", "") for output in outputs)
    return re.findall(rf"^(\w+): {words}$", text, re.MULTILINE)
