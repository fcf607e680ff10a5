"""Each chapter runs from its first cell to its last: solved, and as it is handed out."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from mar_mini.course.chapters import BUDGETS, run_course

REPO = Path(__file__).resolve().parent.parent
STEMS = sorted(
    (path.stem for path in (REPO / "notebooks").glob("[0-9][0-9]_*.ipynb")),
    key=lambda stem: -BUDGETS[stem[:2]],  # the longest first
)
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
def test_a_chapter_as_it_is_handed_out_runs_to_its_end(stem):
    """Unsolved, cell by cell; in a process of its own, since nbval's warnings are not ours."""
    options = ["--nbval-lax", "--nbval-cell-timeout=900", "-q", "-o", "filterwarnings="]
    command = [sys.executable, "-m", "pytest", *options, f"notebooks/{stem}.ipynb"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("stem", STEMS)
def test_what_is_not_written_yet_is_the_packages(stem):
    """As the outputs that are handed out say, one line a check."""
    notebook = nbformat.read(REPO / "notebooks" / f"{stem}.ipynb", as_version=4)
    goes_on = "not written yet, the notebook goes on with the package's"
    assert passed(notebook, goes_on) == checked(notebook)


def checked(notebook) -> list[str]:
    """The names that the chapter's cells give to a check, in order."""
    sources = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    return re.findall(r"^(\w+) = check(?:_\w+)?\.\1\(", sources, re.MULTILINE)


def passed(notebook, words: str) -> list[str]:
    """The names of the lines that the checks printed with these words."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "\n".join(output.get("text", "") for output in outputs)
    return re.findall(rf"^(\w+): {words}$", text, re.MULTILINE)
