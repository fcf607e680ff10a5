"""A claim must be able to fail: without its premise the cell that asserts it turns red."""

from pathlib import Path

import claims
import pytest
from build_notebooks import make_notebook

from mar_mini.course.chapters import CellFailed, execute

pytestmark = pytest.mark.slow
REPO = Path(__file__).resolve().parent.parent
# chapter, words of the claim's cell, what its premise says, and what stands there without it
PREMISES = [
    ("00_tour", "tokens of sixteen steps should agree", "num_iter=steps,", "num_iter=1,"),
    ("01_tokens", "more than 16 times", "for n in (64, 1024)", "for n in (64, 128)"),
    ("02_vae", "expected draws to gain 1 dB", "max_steps=120", "max_steps=12"),
    (
        "03_diffusion",
        "the mean noise is the best guess",
        "x0 = (share * each).sum(1)",
        "x0 = each.mean(1)",
    ),
    (
        "04_diffloss",
        "a token that hardly ever occurs",
        "RADIUS, SPREAD, SHARE, LIMIT = 1.2",
        "RADIUS, SPREAD, SHARE, LIMIT = 0.2",
    ),
    (
        "05_transformer",
        "the rounding of float32",
        "return x + block.mlp.fc2(h)",
        "return block.mlp.fc2(h)",
    ),
    ("09_evaluation", "worse > better", "16 / 255 * noise", "4 / 255 * noise"),
    (
        "08_sampling",
        "largest difference to the package's tokens",
        "mask, order, left, cfg,",
        "mask, order, left, 1.0,",
    ),
    (
        "10_full_size",
        "each part has its own rows",
        "6 * parts[name][part] * rows[part] / 1e9",
        "6 * parts[name][part] * 256 / 1e9",
    ),
    (
        "06_masking",
        "expected one step to lose more than 20 nats",
        "places, places) / REACH",
        "places, places) / 0.1",
    ),
    ("07_mar", "of the way apart", "step_generator(seed, step)", "step_generator(seed, step + 1)"),
]


@pytest.mark.parametrize("stem, words, premise, without", PREMISES, ids=[p[0] for p in PREMISES])
def test_without_its_premise_a_claim_is_red(stem, words, premise, without):
    text = (REPO / "notebooks" / "src" / f"{stem}.py").read_text("utf-8")
    assert text.count(premise) == 1, "the chapter has changed: give the test its new words"
    notebook = make_notebook(text.replace(premise, without), stem, solutions=True)
    at = [i for i, x in enumerate(notebook.cells) if claims.is_claim(x) and words in x.source]
    assert len(at) == 1
    notebook.cells = notebook.cells[: at[0] + 1]
    with pytest.raises(CellFailed, match=f"cell {at[0]} .*AssertionError"):
        execute(notebook, REPO / "notebooks" / "solutions", strict=True)
