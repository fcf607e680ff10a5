"""Building notebooks from their sources, and the check that what is committed matches."""

import base64
import importlib.util
import re
import shutil
import statistics
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

REPO = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("build_notebooks", REPO / "tools/build_notebooks.py")
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)

SOURCE = '''\
# %% [markdown]
# # 6 Doubling

# %%
import functools
import os


# %%
@functools.cache
def double(x):
    """Double a number.

    x: any number.
    """
    # BEGIN SOLUTION about 1 line
    return 2 * x
    # END SOLUTION


class Counter:
    """Counts."""

    def __init__(self, start):
        """Start somewhere."""

        # BEGIN SOLUTION
        self.count = start
        # END SOLUTION

    def step(self):
        # BEGIN SOLUTION about 2 lines
        self.count += 1
        return self.count
        # END SOLUTION


# %% [markdown]
# Your turn.
#
# {{solution double}}

# %% tags=["sample-grid"]
print("strict" if "MAR_MINI_STRICT" in os.environ else "lenient", os.path.basename(os.getcwd()))
print(object())

# %%
# %matplotlib inline
'''


def make(text, solutions=False):
    return tool.make_notebook(text, "06_double", solutions=solutions)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A repository with one chapter, built and executed once."""
    repo = tmp_path_factory.mktemp("built")
    (repo / "notebooks" / "src").mkdir(parents=True)
    (repo / "notebooks" / "src" / "06_double.py").write_text(SOURCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAR_MINI_STRICT", "1")  # a builder's shell must not make it strict
        assert tool.main(["6"], repo) == 0
    return repo


@pytest.fixture
def repo(built, tmp_path):
    """A copy of the built repository, to spoil."""
    return Path(shutil.copytree(built, tmp_path / "repo"))


def test_learner_gets_stubs_and_solution_gets_code():
    learner, solution = make(SOURCE), make(SOURCE, solutions=True)
    assert learner.cells[2].source.split("\n")[5:] == [
        '    """',
        "    raise NotImplementedError  # about 1 line",
        "",
        "",
        "class Counter:",
        '    """Counts."""',
        "",
        "    def __init__(self, start):",
        '        """Start somewhere."""',
        "",
        "        raise NotImplementedError",
        "",
        "    def step(self):",
        "        raise NotImplementedError  # about 2 lines",
    ]
    assert "    return 2 * x\n\n\nclass Counter" in solution.cells[2].source
    for notebook in (learner, solution):
        assert "SOLUTION" not in nbformat.writes(notebook)
        nbformat.validate(notebook)


def test_cells_and_metadata_depend_on_the_source_alone():
    notebook = make(SOURCE)
    assert nbformat.writes(notebook) == nbformat.writes(make(SOURCE))
    assert [cell.id for cell in notebook.cells] == [f"06_double-{i:03d}" for i in range(6)]
    assert [cell.metadata for cell in notebook.cells[3:]] == [{}, {"tags": ["sample-grid"]}, {}]
    assert notebook.cells[5].source == "%matplotlib inline"
    assert notebook.metadata.language_info == {"name": "python"}


@pytest.mark.parametrize(
    ("line", "where"),
    [
        ("    # END SOLUTION\n\n\nclass", ":16: BEGIN SOLUTION without END"),
        ("    # BEGIN SOLUTION about 1 line\n", ":17: END SOLUTION without BEGIN"),
    ],
)
def test_a_marker_without_partner_is_named_with_its_line(line, where):
    with pytest.raises(ValueError, match=where):
        make(SOURCE.replace(line, "class" if "class" in line else "", 1))


@pytest.mark.parametrize(
    "text",
    [
        "# %%\n# BEGIN SOLUTION\nx = 1\n# %%\n# END SOLUTION\n",
        "# %%\n# BEGIN SOLUTION\n# BEGIN SOLUTION\nx = 1\n# END SOLUTION\n",
        "# %%\n# begin solution\nx = 1\n",
    ],
)
def test_markers_pair_up_within_a_cell(text):
    with pytest.raises(ValueError, match=r"^source:\d: "):
        make(text)


def test_folded_solution_is_the_same_in_both_notebooks_without_docstring():
    for solutions in (False, True):
        assert make(SOURCE, solutions).cells[3].source == (
            "Your turn.\n\n<details><summary>Solution</summary>\n\n```python\n"
            "@functools.cache\ndef double(x):\n    return 2 * x\n```\n\n</details>"
        )


def test_folded_solution_of_a_class_and_of_a_method():
    whole = make(SOURCE.replace("{{solution double}}", "{{solution Counter}}")).cells[3].source
    assert "class Counter:\n    def __init__(self, start):\n        self.count = start\n" in whole
    method = make(SOURCE.replace("{{solution double}}", "{{ solution Counter.step }}"))
    assert "```python\ndef step(self):\n    self.count += 1\n" in method.cells[3].source


@pytest.mark.parametrize("name", ["treble", "Counter.double", ""])
def test_an_unknown_solution_is_an_error_that_lists_the_known(name):
    with pytest.raises(ValueError, match="one definition of .* there are 0; defined there: "):
        make(SOURCE.replace("solution double", f"solution {name}"))


def test_a_built_chapter_is_executed_leniently_and_passes_the_check(built, capsys):
    learner = nbformat.read(built / "notebooks/06_double.ipynb", as_version=4)
    assert [c.execution_count for c in learner.cells if c.cell_type == "code"] == [1, 2, 3, 4]
    assert learner.cells[4].outputs[0].text == "lenient notebooks\n<object object>\n"
    solution = nbformat.read(built / "notebooks/solutions/06_double.ipynb", as_version=4)
    assert not any(c.get("outputs") or c.get("execution_count") for c in solution.cells)
    assert sorted(p.name for p in (built / "notebooks").iterdir()) == [
        "06_double.ipynb",
        "solutions",
        "src",
    ]
    assert tool.main(["--check"], built) == 0
    assert capsys.readouterr().err == ""


def test_building_again_changes_nothing(repo):
    paths = sorted(repo.rglob("*.ipynb"))
    before = [path.read_bytes() for path in paths]
    assert tool.main([], repo) == 0
    assert [path.read_bytes() for path in paths] == before


def edit(path, change):
    notebook = nbformat.read(path, as_version=4)
    change(notebook)
    nbformat.write(notebook, path)


def set_source(notebook):
    notebook.cells[2].source += "\n# edited by hand"


def set_output(notebook):
    notebook.cells[2].outputs.append(new_output("stream", text="out"))


def set_error(notebook):
    notebook.cells[2].outputs.append(new_output("error", ename="Oops", evalue="bad"))


def unexecute(notebook):
    notebook.cells[2].execution_count = None


@pytest.mark.parametrize(
    ("name", "change", "complaint"),
    [
        ("06_double", set_source, "cell 2 (06_double-002) differs from the source in its source"),
        ("06_double", unexecute, "cell 2 (06_double-002) was never executed"),
        ("06_double", set_error, "cell 2 (06_double-002) ends in Oops: bad"),
        ("06_double", lambda n: n.cells.pop(), "has 5 cells, its source 6"),
        ("06_double", lambda n: n.metadata.update(x=1), "differs in the notebook's metadata"),
        ("06_double", set_output, None),
        ("solutions/06_double", set_source, "cell 2 (06_double-002) differs"),
        ("solutions/06_double", set_output, "has outputs or execution counts"),
    ],
)
def test_check_names_notebook_and_cell(repo, name, change, complaint, capsys):
    edit(repo / f"notebooks/{name}.ipynb", change)
    assert tool.main(["--check"], repo) == (1 if complaint else 0)
    shown = capsys.readouterr().err
    assert f"notebooks/{name}.ipynb: {complaint}" in shown if complaint else shown == ""


def test_check_notices_a_changed_source_and_files_without_partner(repo, capsys):
    source = repo / "notebooks/src/06_double.py"
    source.write_text(SOURCE.replace("2 * x", "x + x"))
    assert tool.main(["--check", "06"], repo) == 1
    shown = capsys.readouterr().err
    assert "notebooks/06_double.ipynb: cell 3 (06_double-003) differs" in shown  # folded solution
    assert "notebooks/solutions/06_double.ipynb: cell 2 (06_double-002) differs" in shown

    source.rename(source.with_name("07_renamed.py"))
    assert tool.main(["--check"], repo) == 1
    shown = capsys.readouterr().err
    assert "notebooks/06_double.ipynb: has no source" in shown
    assert "notebooks/solutions/07_renamed.ipynb: not built yet" in shown
    assert tool.main(["--check", "08"], repo) == 1
    assert "no chapter '08'; there are: 07_renamed" in capsys.readouterr().err


def test_a_failing_cell_stops_the_build_and_leaves_the_old_notebooks(repo, capsys):
    old = {path: path.read_bytes() for path in repo.rglob("*.ipynb")}
    source = repo / "notebooks/src/06_double.py"
    source.write_text(SOURCE.replace("print(object())", "undefined_name + 1"))
    assert tool.main(["06"], repo) == 1
    shown = capsys.readouterr().err
    assert "06_double: cell 4 (06_double-004): NameError: name 'undefined_name' is not" in shown
    assert 'print("strict" if' in shown and "\x1b" not in shown
    assert {path: path.read_bytes() for path in repo.rglob("*") if path.suffix == ".ipynb"} == old


def test_without_execution_there_are_no_outputs(repo):
    assert tool.main(["--no-execute", "06_double"], repo) == 0
    learner = nbformat.read(repo / "notebooks/06_double.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in learner.cells)
    assert tool.main(["--check"], repo) == 1


@pytest.mark.parametrize(("size", "large"), [(80 * 1024, False), (80 * 1024 + 1, True)])
def test_stored_pictures_have_a_limit(size, large):
    data = {"image/png": base64.b64encode(bytes(size)).decode()}
    cell = new_code_cell("draw()", id="figure", execution_count=1)
    cell.outputs = [new_output("display_data", data=data)]
    found = list(tool.output_faults(new_notebook(cells=[cell])))
    assert (
        found == ["cell 0 (figure) has a picture of 80.0 KB, more than the 80 KB allowed"] * large
    )


def test_stored_outputs_show_no_machine_path_and_no_live_widget():
    cell = new_code_cell("show()", id="show", execution_count=1)
    warning = new_output("stream", name="stderr", text="/tmp/ipykernel_12/3.py:1: UserWarning: x")
    widget = new_output(
        "display_data", data={tool.WIDGET: {}, "text/plain": "<Widget at 0x7ff123>"}
    )
    cell.outputs = [warning, widget]
    notebook = tool.tidy(new_notebook(cells=[cell]))
    assert cell.outputs[1].data == {"text/plain": "<Widget>"}
    assert ["path of the machine" in fault for fault in tool.output_faults(notebook)] == [True]


def test_the_committed_notebooks_match_their_sources(capsys):
    assert tool.main(["--check"]) == 0, capsys.readouterr().err


def test_copies_for_colab_install_first_and_change_nothing_else(built, capsys):
    url = "https://example.org/a name/mar_mini.git"
    assert tool.main(["--colab", url], repo=built) == 0
    assert capsys.readouterr().out == "build/colab/06_double.ipynb\n"
    copy = nbformat.read(built / "build/colab/06_double.ipynb", as_version=4)
    install, *cells = copy.cells
    assert f"git clone -q --depth 1 '{url}' /content/mar_mini" in install.source
    assert "%pip install" in install.source
    learner = make(SOURCE)
    assert [(c.cell_type, c.source) for c in cells] == [
        (c.cell_type, c.source) for c in learner.cells
    ]
    for chapter in (built / "notebooks").glob("*.ipynb"):
        assert "%pip" not in chapter.read_text()


CHAPTERS = sorted((REPO / "notebooks" / "src").glob("[0-9][0-9]_*.py"))


@pytest.mark.parametrize("source", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_is_short_and_its_cells_too(source):
    notebook = tool.make_notebook(source.read_text(), source.stem, solutions=False)
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    text = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    lengths = [sum(bool(line.strip()) for line in cell.split("\n")) for cell in code]
    longer = source.stem.startswith("07")  # the chapter that puts all parts together
    assert len(notebook.cells) <= (60 if longer else 50)
    assert statistics.median(lengths) <= 8
    assert len(" ".join(text).split()) <= (3500 if longer else 2500)
    if not source.stem.startswith("00"):  # the tour has no exercises
        assert len(notebook.cells) >= 30
        cards = re.findall(r"(?m)^> \*\*Exercise \d\*\*.*minutes\n((?:>.*\n?)*)", "\n".join(text))
        assert len(cards) >= 3
        assert all(re.search(r"> \w|> `", card) for card in cards), "say what is to be done"
        minutes = re.findall(r"\*\*Exercise \d\*\*.* (\d+) minutes", "\n".join(text))
        (total,) = re.findall(r"\*\*exercises\*\* (\d+) min", text[0])
        assert sum(map(int, minutes)) == int(total), "the cards' minutes, and the header's"
    assert not any("# fmt:" in cell for cell in code), "no word of a formatter to a learner"
