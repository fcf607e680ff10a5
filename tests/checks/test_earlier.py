"""What a learner wrote in an earlier chapter reaches the later one; the rest of it is not run."""

import nbformat
import pytest
import torch
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from mar_mini import diffloss, transformer
from mar_mini.checks import diffloss as check_diffloss
from mar_mini.checks import earlier
from mar_mini.checks import transformer as check_transformer

SETUP = """\
%matplotlib inline
import torch
import torch.nn.functional as F
from mar_mini.checks import diffloss as check
raise SystemExit("nobody runs this cell")"""
MODULATE = """\
def modulate(x, shift, scale):
    return x * (ONE + scale) + shift"""
USER = """\
class User:
    def __call__(self, x):
        return modulate(x, x, x)"""
ATTEND = """\
def attend(q, k, v):
    return scores(q, k).softmax(-1) @ v"""
HELPER = "def scores(q, k):\n    return q @ k.mT / q.shape[-1] ** POWER"


@pytest.fixture
def write(tmp_path):
    def write(*cells, name="05_parts.ipynb"):
        notebook = new_notebook(cells=[new_markdown_cell("# 5"), *map(new_code_cell, cells)])
        nbformat.write(notebook, tmp_path / name)
        return tmp_path

    return write


def test_a_function_comes_with_all_it_uses_and_nothing_else_runs(write):
    folder = write(SETUP, "POWER = 0.3", HELPER, "POWER = 1 / 2", ATTEND, "1 / 0", "not Python(")
    mine = earlier.own("05", "attend", folder)
    q, k, v = torch.randn(3, 2, 3, 4, 8)
    torch.testing.assert_close(mine(q, k, v), transformer.attend(q, k, v))
    assert check_transformer.attend(mine) is mine


def test_local_names_are_not_taken_for_those_of_the_notebook(write):
    """`model` and `n` outside need what is not there; the function has its own."""
    function = "def f(model, *, power: int = 2):\n    return [model**power for n in range(2) if n]"
    folder = write("model, L = pipeline.mar, 3", "n = nothing", function)
    assert earlier.own("05", "f", folder)(3) == [9]


def test_the_last_definition_counts(write):
    folder = write("def f():\n    return 1", "def f():\n    return 2", "f = len('abc')")
    assert earlier.own("05", "f", folder)() == 2


def test_what_it_uses_is_checked_as_in_its_own_chapter(write, capsys):
    """A helper that is not solved there stands for the package's, as it did there."""
    stub = "def modulate(x, shift, scale):\n    raise NotImplementedError  # about 1 line"
    checked = "modulate = check.modulate(modulate)"
    x = torch.randn(2, 4)
    for helper in (stub, "ONE = 1\n" + MODULATE):
        user = earlier.own("05", "User", write(SETUP, helper, checked, USER, "User = list(User)"))
        torch.testing.assert_close(user()(x), diffloss.modulate(x, x, x))
        unchecked = earlier.own("05", "User", write(SETUP, helper, USER))
        if helper is stub:
            with pytest.raises(NotImplementedError):
                unchecked()(x)
    assert capsys.readouterr().out == ""  # what the checks print belongs to their own chapter


def test_a_mistake_is_shown_with_its_line(write, capsys, monkeypatch):
    monkeypatch.delenv("MAR_MINI_STRICT", raising=False)
    wrong = earlier.own("05", "attend", write("def attend(q, k, v):\n    w = q / 0 @ nothing\n"))
    assert check_transformer.attend(wrong) is transformer.attend
    assert "NameError" in (out := capsys.readouterr().out)
    assert "line 2 of attend: `w = q / 0 @ nothing`" in out


@pytest.mark.parametrize(
    ("cells", "chapter", "said"),
    [
        ([ATTEND], "04", "expected one notebook 04_*.ipynb beside this one, found none"),
        (["attend = 3"], "05", "05_parts.ipynb has no `def attend` or `class attend`; save that"),
        (
            ["from gone import x", "def attend():\n    x"],
            "05",
            "chapter 05: attend cannot run, ModuleNotFoundError: No module named 'gone'",
        ),
        (["def attend(q=missing):\n    pass"], "05", "NameError: name 'missing' is not defined"),
        (["def attend(q, k, v):\n    raise NotImplementedError"], "05", "not written yet"),
    ],
)
def test_what_cannot_be_fetched_leaves_the_packages_and_says_why(
    write, capsys, monkeypatch, cells, chapter, said
):
    monkeypatch.delenv("MAR_MINI_STRICT", raising=False)
    mine = earlier.own(chapter, "attend", write(*cells))
    assert check_transformer.attend(mine) is transformer.attend
    assert said in capsys.readouterr().out


def test_a_class_that_cannot_be_fetched_and_a_broken_file(write, capsys, monkeypatch):
    monkeypatch.delenv("MAR_MINI_STRICT", raising=False)
    folder = write(ATTEND)
    (folder / "05_parts.ipynb").write_text('{"cells": [')
    mine = earlier.own("05", "ResBlock", folder)
    assert check_diffloss.ResBlock(mine) is diffloss.ResBlock
    assert "chapter 05: ResBlock cannot run, " in capsys.readouterr().out


def test_a_notebook_set_aside_is_not_meant(write):
    folder = write("def f():\n    return 'old'", name="05_parts.before-reset-1.ipynb")
    write("def f():\n    return 'new'")
    assert earlier.own("05", "f", folder)() == "new"
