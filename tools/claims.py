"""Does what the chapters claim hold for other seeds? Runs their solved sources, five times each.

    python tools/claims.py [CHAPTER ...]        all chapters, or `06`, or `06_masking`
    python tools/claims.py --seeds 0 1 01

A claim is a cell with the tag `claim`: it asserts something, prints by how much it holds, and takes
its randomness from `seed = int(os.environ.get("MAR_MINI_SEED", 0))`. What each seed gave goes to
benchmarks/results/claims.json and docs/claims.md; chapters that were not run keep their entries
there. Exit status 1 if a claim of those that ran does not hold. All chapters take about an hour.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from datetime import date
from pathlib import Path

from build_notebooks import make_notebook
from nbformat import NotebookNode
from tqdm import tqdm

from mar_mini.course.chapters import CellFailed, execute, pick_chapters
from mar_mini.files import write_atomically

REPO = Path(__file__).resolve().parent.parent
TAG, ALLOWED = "claim", "raises-exception"  # the second: the cells after it run all the same
VARIABLE = "MAR_MINI_SEED"
SEEDS = (0, 1, 2, 3, 4)


def is_claim(cell: NotebookNode) -> bool:
    return cell.cell_type == "code" and TAG in cell.metadata.get("tags", [])


def name_of(notebook: NotebookNode, index: int) -> str:
    """What a claim is called: the cell's first comment line, else the heading it stands under.

    A heading is followed by what its assertions say when they fail.
    """
    source = notebook.cells[index].source
    comment = re.search(r"^# *(?!%%)(\S.*)$", source, re.MULTILINE)
    if comment:
        return comment[1].strip()
    above = [cell.source for cell in notebook.cells[:index] if cell.cell_type == "markdown"]
    headings = [heading for text in above for heading in re.findall(r"(?m)^#+ +(.*\S)", text)]
    messages = re.findall(r'(?m)^\s*assert\b.*, f?"(.*)"$', source)
    heading = headings[-1] if headings else f"cell {index}"
    return f"{heading}: {'; '.join(messages)}" if messages else heading


def printed(cell: NotebookNode) -> str:
    streams = [o.text for o in cell.outputs if o.output_type == "stream" and o.name == "stdout"]
    return "".join(streams).rstrip()


def fault(cell: NotebookNode, failure: CellFailed | None) -> str | None:
    """Why a claim does not hold, after its chapter ran or failed elsewhere; None if it does."""
    for output in cell.outputs:
        if output.output_type == "error":
            return f"{output.ename}: {output.evalue}".rstrip(": ")
    if cell.execution_count is None:
        return f"not reached: {failure}"
    if not re.search(r"^\s*assert\b", cell.source, re.MULTILINE):
        return "the cell asserts nothing"
    return None


@contextmanager
def seeded(seed: int):
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = str(seed)
    try:
        yield
    finally:
        os.environ.pop(VARIABLE)
        if before is not None:
            os.environ[VARIABLE] = before


def run_chapter(repo: Path, stem: str, seed: int) -> list[dict]:
    """Run a chapter once; for each claim its name, what it printed, and its fault or None.

    Raises CellFailed if the kernel died: that says nothing of a claim.
    """
    notebook = solved(repo, stem)
    for cell in filter(is_claim, notebook.cells):
        cell.metadata["tags"] = [*cell.metadata["tags"], ALLOWED]
    failure = None
    with seeded(seed):
        try:
            execute(notebook, repo / "notebooks" / "solutions", strict=True)
        except CellFailed as error:
            if "DeadKernelError" in str(error):
                raise
            failure = error
    runs = [
        {
            "cell": cell.id,
            "claim": name_of(notebook, i),
            "seed": seed,
            "printed": printed(cell),
            "fault": fault(cell, failure),
        }
        for i, cell in enumerate(notebook.cells)
        if is_claim(cell)
    ]
    if failure is not None and not any(run["fault"] for run in runs):  # it broke behind the last
        runs[-1]["fault"] = f"the chapter does not run to its end: {failure}"
    return runs


def solved(repo: Path, stem: str) -> NotebookNode:
    text = (repo / "notebooks" / "src" / f"{stem}.py").read_text("utf-8")
    return make_notebook(text, stem, solutions=True, where=f"notebooks/src/{stem}.py")


def gather(runs: list[dict]) -> list[dict]:
    """From one entry a claim and seed to one a claim, with its seeds in `runs`."""
    claims: dict[str, dict] = {}
    for run in runs:
        entry = {key: run[key] for key in ("cell", "claim")}
        claim = claims.setdefault(run["cell"], {**entry, "runs": []})
        claim["runs"].append({key: run[key] for key in ("seed", "printed", "fault")})
    return list(claims.values())


def margins(text: str) -> str:
    """Of what a cell printed, the lines that speak of a margin or of the claim; else the last."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"\bmargins?\b|\bclaim", line, re.IGNORECASE)]
    return " / ".join(telling or lines[-1:])


def table(result: dict) -> str:
    """The page docs/claims.md."""
    seeds = sorted({r["seed"] for c in result["chapters"].values() for x in c for r in x["runs"]})
    lines = [
        "# What the chapters claim, seed by seed",
        "",
        "Written by `make claims` (`tools/claims.py`). A claim is a cell that asserts something",
        "and prints by how much it holds. Here each chapter ran, solved, with several values of",
        f"`{VARIABLE}`; everything that the cells printed is in `benchmarks/results/claims.json`.",
        "",
        f"Date {result['date']}, commit {result['commit']}, seeds {seeds}.",
        "",
        "| chapter | claim | holds | margin for each seed |",
        "|---|---|---|---|",
    ]
    for stem, claims in result["chapters"].items():
        for claim in claims:
            faults = [run["fault"] for run in claim["runs"]]
            holds = f"{faults.count(None)} of {len(faults)}"
            verdict = holds if not any(faults) else f"**FAILS**, {holds}"
            each = [f"{run['seed']}: {margins(run['printed'])}" for run in claim["runs"]]
            each = [f"{e} **{f}**" if f else e for e, f in zip(each, faults, strict=True)]
            cells = (stem, claim["claim"], verdict, "<br>".join(each))
            cells = [" ".join(cell.split()).replace("|", "\\|") for cell in cells]
            lines.append(f"| {' | '.join(cells)} |")
    without = [stem for stem, claims in result["chapters"].items() if not claims]
    if without:
        lines += ["", f"Chapters without claims: {', '.join(without)}."]
    return "\n".join(lines) + "\n"


def write(repo: Path, result: dict) -> None:
    """JSON and page; whatever happens, neither is half written."""
    pages = (
        (repo / "benchmarks" / "results" / "claims.json", json.dumps(result, indent=1) + "\n"),
        (repo / "docs" / "claims.md", table(result)),
    )
    for path, text in pages:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda temporary, text=text: temporary.write_text(text, "utf-8"))


def main(arguments: list[str] | None = None, repo: Path = REPO) -> int:
    """Run and write; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("chapters", nargs="*", metavar="CHAPTER", help="06 or 06_masking; all")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    options = parser.parse_args(arguments)
    stems = sorted(path.stem for path in (repo / "notebooks" / "src").glob("[0-9][0-9]_*.py"))
    try:
        chosen = pick_chapters(stems, options.chapters)
    except ValueError as error:
        parser.error(str(error))
    path = repo / "benchmarks" / "results" / "claims.json"
    known = json.loads(path.read_text("utf-8"))["chapters"] if path.exists() else {}
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=repo, capture_output=True, text=True
    ).stdout.strip()
    claiming = [stem for stem in chosen if any(map(is_claim, solved(repo, stem).cells))]
    with tqdm(total=len(claiming) * len(options.seeds), desc="claims") as bar:
        for stem in chosen:
            runs = []
            for seed in options.seeds if stem in claiming else ():
                bar.set_postfix_str(f"{stem}, seed {seed}")
                try:
                    runs += run_chapter(repo, stem, seed)
                except (CellFailed, KeyboardInterrupt) as error:
                    why = error if str(error) else "interrupted"
                    print(f"{stem}, seed {seed}: {why}; not recorded", file=sys.stderr)
                    return 1
                bar.update()
            known[stem] = gather(runs)
            there = {stem: known[stem] for stem in stems if stem in known}
            write(repo, {"date": str(date.today()), "commit": commit, "chapters": there})
    failures = [
        f"{stem}, seed {run['seed']}: {claim['claim']}: {run['fault']}"
        for stem in chosen
        for claim in known[stem]
        for run in claim["runs"]
        if run["fault"]
    ]
    print("\n".join(failures), end="\n" if failures else "", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
