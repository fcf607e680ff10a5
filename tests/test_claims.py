"""Claims of the chapters, rerun with other seeds: what holds is recorded, what fails is red."""

import json

import claims
import pytest
from nbformat.v4 import new_code_cell, new_output

CHAPTER = """\
# %% [markdown]
# # 1 Seeds

# %%
import os

seed = int(os.environ.get("MAR_MINI_SEED", 0))


def double(x):
    # BEGIN SOLUTION about 1 line
    return 2 * x
    # END SOLUTION


# %% [markdown]
# ## Doubling

# %% tags=["claim"]
# Twice a seed is even.
print("seeds of any kind")
print(f"margin {double(seed)} and | 1")
assert double(seed) % 2 == 0

# %% tags=["claim"]
print(f"{seed} of 2")
assert SECOND, "expected a small seed"

# %% tags=["claim"]
# This cell comes after the one that fails.
print("still here")
assert True
"""


def chapter(repo, text, stem="01_seeds"):
    folder = repo / "notebooks" / "src"
    for there in (folder, repo / "notebooks" / "solutions"):
        there.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.py").write_text(text)


def recorded(repo):
    return json.loads((repo / "benchmarks" / "results" / "claims.json").read_text())["chapters"]


@pytest.mark.slow
def test_a_claim_that_holds_is_recorded_and_one_that_fails_is_red(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MAR_MINI_SEED", "7")
    chapter(tmp_path, CHAPTER.replace("SECOND", "seed < 1"))
    chapter(tmp_path, "# %%\n1 / 0  # never run: there is no claim here\n", "02_none")
    assert claims.main(["--seeds", "0", "1"], tmp_path) == 1
    holds, fails, after = recorded(tmp_path)["01_seeds"]
    assert holds["claim"] == "Twice a seed is even."
    assert holds["runs"] == [
        {"seed": s, "printed": f"seeds of any kind\nmargin {2 * s} and | 1", "fault": None}
        for s in (0, 1)
    ]
    assert fails["claim"] == "Doubling: expected a small seed"
    assert [run["fault"] for run in fails["runs"]] == [
        None,
        "AssertionError: expected a small seed",
    ]
    assert [run["printed"] for run in after["runs"]] == ["still here"] * 2
    assert recorded(tmp_path)["02_none"] == []
    page = (tmp_path / "docs" / "claims.md").read_text()
    assert (
        "| 01_seeds | Twice a seed is even. | 2 of 2 | 0: margin 0 and \\| 1<br>1: margin 2 and "
        "\\| 1 |"
    ) in page
    assert "| **FAILS**, 1 of 2 | 0: 0 of 2<br>1: 1 of 2 **AssertionError: expected a" in page
    assert "Chapters without claims: 02_none." in page and "seeds [0, 1]" in page
    assert "01_seeds, seed 1: Doubling: expected a small seed" in capsys.readouterr().err
    assert claims.os.environ["MAR_MINI_SEED"] == "7"

    chapter(tmp_path, CHAPTER.replace("SECOND", "seed < 3"))  # mended; the other chapter stays
    assert claims.main(["01", "--seeds", "0"], tmp_path) == 0
    assert list(recorded(tmp_path)) == ["01_seeds", "02_none"]
    assert [len(claim["runs"]) for claim in recorded(tmp_path)["01_seeds"]] == [1, 1, 1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "broken, faults",
    [
        ("1 / 0\n\n# %% tags=['claim']\nassert True\n", ["not reached: cell 0"]),
        ("# %% tags=['claim']\nassert True\n\n# %%\n1 / 0\n", ["does not run to its end: cell 1"]),
        ("# %% tags=['claim']\nprint('asserted')\n", ["the cell asserts nothing"]),
    ],
)
def test_a_chapter_that_breaks_or_asserts_nothing_is_red(tmp_path, broken, faults):
    chapter(tmp_path, broken if broken.startswith("#") else f"# %%\n{broken}")
    assert claims.main(["--seeds", "0"], tmp_path) == 1
    (claim,) = recorded(tmp_path)["01_seeds"]
    (run,) = claim["runs"]
    assert faults[0] in run["fault"]


def test_a_kernel_that_died_is_no_claim_that_failed(tmp_path, capsys, monkeypatch):
    def killed(*_, **__):
        raise claims.CellFailed("cell 1 (01_seeds-001): DeadKernelError: Kernel died", "")

    monkeypatch.setattr(claims, "execute", killed)
    chapter(tmp_path, CHAPTER.replace("SECOND", "True"))
    assert claims.main(["--seeds", "0"], tmp_path) == 1
    assert "01_seeds, seed 0: cell 1" in capsys.readouterr().err
    assert not (tmp_path / "benchmarks").exists()


def test_the_page_shows_the_line_with_the_margin():
    assert claims.margins("a\nmargin 3\nb\n") == "margin 3"
    assert claims.margins("lost 3 (claimed: 2)\nmargins: 1, 2\nc") == (
        "lost 3 (claimed: 2) / margins: 1, 2"
    )
    assert claims.margins("a\nlast\n\n") == "last" and claims.margins("") == ""


def test_what_a_cell_prints_is_its_standard_output():
    outputs = [
        new_output("stream", name="stderr", text="warning\n"),
        new_output("stream", name="stdout", text="margin 1\n"),
    ]
    assert claims.printed(new_code_cell("1", outputs=outputs)) == "margin 1"
