"""Build the course's notebooks from `notebooks/src/NN_stem.py` (jupytext `py:percent`).

    python tools/build_notebooks.py [CHAPTER ...]   build all chapters, or `06`, or `06_masking`
    python tools/build_notebooks.py --check         do the committed notebooks match their sources?
    python tools/build_notebooks.py --colab URL     copies for Colab, in build/colab

Each source gives the learner's notebook, executed, and `solutions/NN_stem.ipynb`, without outputs.
In a code cell the lines between `# BEGIN SOLUTION about 3 lines` and `# END SOLUTION` are the
solution; the learner sees `raise NotImplementedError  # about 3 lines`. In a markdown cell the line
`{{solution NAME}}` becomes NAME's solution, folded. A copy for Colab begins with a cell that gets
the course from the repository at URL.
"""

import argparse
import ast
import base64
import os
import re
import shlex
import sys
import textwrap
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import jupytext
import nbformat
from nbformat import NotebookNode

from mar_mini.course.chapters import CellFailed, execute, pick_chapters

REPO = Path(__file__).resolve().parent.parent
MARKER = re.compile(r"(\s*)#\s*(BEGIN|END)\s+SOLUTION\b:?\s*(.*?)\s*$", re.IGNORECASE)
FOLDED = re.compile(r"^[ \t]*\{\{ *solution\b *(.*?) *\}\}[ \t]*$", re.MULTILINE)
WIDGET = "application/vnd.jupyter.widget-view+json"
PICTURE_LIMIT = 80 * 1024  # bytes
MACHINE_PATHS = (f"{REPO}{os.sep}", f"{os.sep}site-packages{os.sep}", f"{os.sep}ipykernel_")
INSTALL = """\
# on Colab: the course, and what it needs beside the torch that is there
!git clone -q --depth 1 {repository} /content/mar_mini
%pip install -q -e /content/mar_mini
import sys

sys.path.insert(0, "/content/mar_mini")  # an installed package is found after a restart only"""
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def resolve_markers(text: str, *, solutions: bool, where: str) -> str:
    """Keep the solutions in a source text, or put stubs in their place; no marker line remains.

    Raises ValueError naming file and line for a marker without its partner in the same cell.
    """
    kept, begun = [], None
    for number, line in enumerate(text.split("\n"), 1):
        indent, kind, note = (m := MARKER.match(line)) and m.groups() or ("", "", "")
        if kind.upper() == "BEGIN" and begun is None:
            begun = number
            if not solutions:
                kept.append(f"{indent}raise NotImplementedError" + (f"  # {note}" if note else ""))
        elif kind.upper() == "END" and begun is not None:
            begun = None
        elif begun is not None and (kind or line.startswith("# %%")):
            break
        elif kind:
            raise ValueError(f"{where}:{number}: END SOLUTION without BEGIN SOLUTION in its cell")
        elif begun is None or solutions:
            kept.append(line)
    if begun is not None:
        raise ValueError(f"{where}:{begun}: BEGIN SOLUTION without END SOLUTION in its cell")
    return "\n".join(kept)


def definition(text: str, name: str, where: str) -> str:
    """Return the source of one function, class or `Class.method` of a text, docstrings removed.

    Raises ValueError unless the text defines that name exactly once.
    """
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    body = ast.parse(text, filename=where).body
    for part in name.split("."):
        there = [node for node in body if isinstance(node, kinds)]
        found = [node for node in there if node.name == part]
        if len(found) != 1:
            names = ", ".join(node.name for node in there) or "nothing"
            raise ValueError(
                f"{where}: {{{{solution {name}}}}} needs one definition of {part!r}, there are "
                f"{len(found)}; defined there: {names}"
            )
        node, body = found[0], found[0].body
    lines = text.split("\n")
    dropped = set()
    for inner in (n for n in ast.walk(node) if isinstance(n, kinds)):
        first = inner.body[0]
        if ast.get_docstring(inner) is not None and len(inner.body) > 1:
            blank = not lines[first.end_lineno].strip()
            dropped.update(range(first.lineno, first.end_lineno + 1 + blank))
    start = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    kept = [lines[n - 1] for n in range(start, node.end_lineno + 1) if n not in dropped]
    return textwrap.dedent("\n".join(kept))


def make_notebook(text: str, stem: str, *, solutions: bool, where: str = "source") -> NotebookNode:
    """Turn a source text into the learner's or the solution notebook, not executed.

    Raises ValueError for markers that do not pair up and for an unknown `{{solution NAME}}`.
    """
    solved = resolve_markers(text, solutions=True, where=where)
    chosen = solved if solutions else resolve_markers(text, solutions=False, where=where)

    def fold(match: re.Match) -> str:
        code = definition(solved, match[1], where)
        return f"<details><summary>Solution</summary>\n\n```python\n{code}\n```\n\n</details>"

    notebook = jupytext.reads(chosen, fmt="py:percent")
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    notebook.metadata = nbformat.from_dict(METADATA)
    for index, cell in enumerate(notebook.cells):
        cell.id = f"{stem}-{index:03d}"
        keep = {key: cell.metadata[key] for key in ("jupyter", "tags") if key in cell.metadata}
        cell.metadata = nbformat.from_dict(keep)
        cell.source = cell.source.strip("\n")
        if cell.cell_type == "markdown":
            cell.source = FOLDED.sub(fold, cell.source)
    nbformat.validate(notebook)
    return notebook


def tidy(notebook: NotebookNode) -> NotebookNode:
    """Take out of an executed notebook what changes from run to run."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            data.pop(WIDGET, None)  # names a live model that no reader has
            if "image/png" in data:
                data.pop("text/html", None)  # the same picture, for live notebooks
            for texts, key in ((output, "text"), (output.get("data", {}), "text/plain")):
                if key in texts:
                    texts[key] = re.sub(r" at 0x[0-9a-fA-F]{6,}", "", texts[key])
    return notebook


def output_faults(notebook: NotebookNode) -> Iterator[str]:
    """Yield what an executed notebook must not be committed with."""
    for index, cell in enumerate(notebook.cells):
        name = f"cell {index} ({cell.id})"
        if cell.cell_type != "code" or not cell.source.strip():
            continue
        if cell.execution_count is None:
            yield f"{name} was never executed"
        for output in cell.outputs:
            data = output.get("data", {})
            size = len(base64.b64decode(data.get("image/png", "")))
            text = output.get("text", "") + data.get("text/plain", "") + data.get("text/html", "")
            if output.output_type == "error":
                yield f"{name} ends in {output.ename}: {output.evalue}"
            if size > PICTURE_LIMIT:
                yield f"{name} has a picture of {size / 1024:.1f} KB, more than the 80 KB allowed"
            if any(path in text for path in MACHINE_PATHS):
                yield f"{name} shows a path of the machine it ran on (a warning?)"


def first_difference(committed: NotebookNode, built: NotebookNode) -> str | None:
    """Name the first cell in which two notebooks differ, outputs and execution counts aside."""
    for index, (old, new) in enumerate(zip(committed.cells, built.cells, strict=False)):
        for key in ("cell_type", "source", "metadata", "id"):
            if old.get(key) != new[key]:
                return f"cell {index} ({new.id}) differs from the source in its {key}"
    if len(committed.cells) != len(built.cells):
        return f"has {len(committed.cells)} cells, its source {len(built.cells)}"
    return None if committed.metadata == built.metadata else "differs in the notebook's metadata"


def both_notebooks(repo: Path, stem: str) -> list[tuple[Path, NotebookNode]]:
    """Make a chapter's learner's and solution notebooks, each with the path it is committed at."""
    folder = repo / "notebooks"
    source = folder / "src" / f"{stem}.py"
    text, where = source.read_text("utf-8"), source.relative_to(repo).as_posix()
    paths = [(folder / f"{stem}.ipynb", False), (folder / "solutions" / f"{stem}.ipynb", True)]
    return [(path, make_notebook(text, stem, solutions=s, where=where)) for path, s in paths]


def faults(repo: Path, stem: str) -> Iterator[str]:
    """Yield what is wrong with a chapter's two committed notebooks."""
    for path, built in both_notebooks(repo, stem):
        name = path.relative_to(repo).as_posix()
        if not path.exists():
            yield f"{name}: not built yet"
            continue
        committed = nbformat.read(path, as_version=4)
        found = [first_difference(committed, built)]
        if path.parent.name != "solutions":
            found += output_faults(committed)
        elif any(c.get("outputs") or c.get("execution_count") for c in committed.cells):
            found.append("has outputs or execution counts, a solution notebook has none")
        yield from (f"{name}: {fault}" for fault in found if fault)


def build(repo: Path, stem: str, *, run: bool = True) -> None:
    """Write a chapter's two notebooks; where a cell fails or has a fault, neither is touched.

    Raises CellFailed for a cell that fails, ValueError for a faulty source or output.
    """
    (_, learner), _ = made = both_notebooks(repo, stem)
    if run:
        execute(learner, repo / "notebooks", strict=False)
        found = list(output_faults(tidy(learner)))
        if found:
            raise ValueError("\n".join(f"{stem}: {fault}" for fault in found))
    for path, notebook in made:
        path.parent.mkdir(exist_ok=True)
        whole = path.with_name(f".{path.name}.tmp")
        whole.write_text(nbformat.writes(notebook).rstrip("\n") + "\n", "utf-8")
        os.replace(whole, path)


def colab_copy(learner: NotebookNode, repository: str) -> NotebookNode:
    """The learner's notebook, not executed, with a first cell that installs the course on Colab."""
    notebook = deepcopy(learner)
    code = INSTALL.format(repository=shlex.quote(repository))
    cell = nbformat.v4.new_code_cell(code, id="install", metadata={"tags": ["colab"]})
    notebook.cells.insert(0, cell)
    return notebook


def build_for_colab(repo: Path, stem: str, repository: str) -> Path:
    """Write a chapter's copy for Colab to build/colab."""
    (_, learner), _ = both_notebooks(repo, stem)
    path = repo / "build" / "colab" / f"{stem}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(nbformat.writes(colab_copy(learner, repository)) + "\n", "utf-8")
    return path


def main(arguments: list[str] | None = None, repo: Path = REPO) -> int:
    """Build or check; return the exit status."""
    parser = argparse.ArgumentParser(description="Build the notebooks from notebooks/src.")
    parser.add_argument("chapters", nargs="*", metavar="CHAPTER", help="06 or 06_masking; all")
    parser.add_argument("--check", action="store_true", help="only compare; 1 on a mismatch")
    parser.add_argument("--colab", metavar="URL", help="copies that install the course from there")
    parser.add_argument("--no-execute", action="store_true", help="learner's without outputs")
    options = parser.parse_args(arguments)
    folder = repo / "notebooks"
    sources = {path.stem for path in (folder / "src").glob("[0-9][0-9]_*.py")}
    failures = [] if sources else [f"no chapter in {folder / 'src'}"]
    try:
        stems = pick_chapters(sources, options.chapters)
        for stem in stems:
            if options.check:
                failures += faults(repo, stem)
            elif options.colab:
                print(build_for_colab(repo, stem, options.colab).relative_to(repo))
            else:
                print(f"{stem} ...", flush=True)
                build(repo, stem, run=not options.no_execute)
    except CellFailed as error:
        failures.append(f"{stem}: {error}\n\n{error.details}")
    except (ValueError, SyntaxError) as error:
        failures.append(str(error))
    if options.check and not options.chapters:
        notebooks = sorted([*folder.glob("*.ipynb"), *folder.glob("solutions/*.ipynb")])
        orphans = [path for path in notebooks if path.stem not in sources]
        failures += [f"{path.relative_to(repo).as_posix()}: has no source" for path in orphans]
    print("\n".join(failures), end="\n" if failures else "", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
