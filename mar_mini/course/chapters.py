"""Run the whole course, and lend its chapters to a learner without ever writing over their work.

`notebooks/` holds the chapters as they are handed out, `notebooks/solutions/` the solved ones,
`my/` (which git ignores) the learner's copies. Nothing prints: `run_course` yields.
"""

import asyncio
import base64
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

JUPYTER = Path(__file__).parents[1] / "viz" / "jupyter"  # a page template, and settings
SAMPLE_TAG = "sample-grid"
CELL_TIMEOUT = 1800  # seconds; well above any budget, so that only a hanging cell meets it
AT_ONCE = 2  # chapters, each in a kernel of its own
SECONDS = (80, 25, 100, 80, 75, 30, 85, 270, 130, 60, 50)  # on one core of a laptop
BUDGETS = {f"{chapter:02d}": seconds for chapter, seconds in enumerate(SECONDS)}


class CellFailed(RuntimeError):
    """A notebook cell that raised, hung or lost its kernel; `details` has source and traceback."""

    def __init__(self, message: str, details: str) -> None:
        super().__init__(message)
        self.details = details


class CourseFailed(RuntimeError):
    """A chapter that did not run to its end."""


@dataclass(frozen=True)
class ChapterRun:
    """One chapter on its way: yielded when it starts and, with `seconds`, when it has ended."""

    stem: str
    path: Path  # where the executed notebook goes
    budget: float | None  # seconds; None for a chapter that has none
    seconds: float | None = None  # None: started, not ended
    error: str | None = None  # which cell and which error

    @property
    def finished(self) -> bool:
        return self.seconds is not None

    @property
    def over_budget(self) -> bool:
        return self.finished and self.budget is not None and self.seconds > self.budget


def pick_chapters(stems: Iterable[str], wanted: Iterable[str] | None = None) -> list[str]:
    """Return the stems that are wanted (`06`, `6` or `06_masking`), in order; all for none.

    Raises ValueError for a chapter that is not there, listing those that are.
    """
    stems, picked = sorted(stems), set()
    for name in wanted or stems:
        found = [s for s in stems if s == name or s.split("_")[0] == name.zfill(2)]
        if not found:
            raise ValueError(f"no chapter {name!r}; there are: {', '.join(stems) or 'none'}")
        picked.update(found)
    return sorted(picked)


def execute(notebook, folder: Path, *, strict: bool) -> None:
    """Execute a notebook node in place, working directory `folder`, in a fresh kernel.

    strict: exercise checks raise instead of handing out the package's solution.
    Raises CellFailed for the first cell that fails; the node keeps the outputs up to there.
    """
    with event_loop() as loop:
        loop.run_until_complete(execute_async(notebook, folder, strict=strict))


async def execute_async(
    notebook, folder: Path, *, strict: bool, threads: int | None = None
) -> None:
    """`execute`, to be awaited. threads: what the kernel computes with, unless the user says."""
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    # MPLBACKEND would keep figures out of the notebook
    env = {k: v for k, v in os.environ.items() if k not in ("MAR_MINI_STRICT", "MPLBACKEND")}
    if threads is not None:
        env.setdefault("OMP_NUM_THREADS", str(threads))
    at = {}
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=CELL_TIMEOUT,
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
        shutdown_kernel="immediate",  # asked to end in the middle of a cell, it prints tracebacks
        extra_arguments=["--log-level=ERROR"],  # no warning that local traffic is not encrypted
        on_cell_start=at.update,
    )
    try:
        await client.async_execute(env=env | {"MAR_MINI_STRICT": "1"} if strict else env)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        details = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
        what = getattr(error, "evalue", details.splitlines()[0])
        text = f"cell {at['cell_index']} ({at['cell'].id}): "
        text += " ".join(f"{getattr(error, 'ename', type(error).__name__)}: {what}".split())
        if at["cell"].source not in details:
            details = f"{at['cell'].source}\n\n{details}"
        raise CellFailed(text.rstrip(":"), details) from error


class Loop(asyncio.SelectorEventLoop):
    """Ctrl-C stays a KeyboardInterrupt; nbclient's handler would end only one of two kernels."""

    def add_signal_handler(self, *_):
        raise NotImplementedError


@contextmanager
def event_loop() -> Iterator[Loop]:
    """A loop at whose end, whatever ends it, nothing runs any more, kernels included."""
    loop = Loop()
    try:
        yield loop
    finally:
        while tasks := asyncio.all_tasks(loop):
            for task in tasks:
                task.cancel()
            loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        loop.close()


def cores() -> int:
    """Those that this process may use."""
    usable = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    return len(usable(0)) if usable else os.cpu_count() or 1


def sharing(tasks: int) -> tuple[int, int | None]:
    """How many of the tasks to run at once, and the threads of each; None: as many as they like.

    Small models hardly use a second core: it does more for a second chapter.
    """
    at_once = min(AT_ONCE, cores(), tasks)
    return at_once, cores() // at_once if at_once > 1 else None


def run_course(
    repo: Path, build: Path, chapters: Iterable[str] | None = None
) -> Iterator[ChapterRun]:
    """Execute the solution notebooks, strictly, two at a time, yielding as they go.

    build: gets `course/NN_stem.ipynb` for each chapter, and `samples.png`, the last picture of
        a cell tagged `sample-grid` in the last chapter that has one.
    Yields each chapter twice: started, then finished. After a finished chapter with an error it
    stops the other that is under way and raises CourseFailed. Raises ValueError for an unknown
    chapter.
    """
    import nbformat

    folder = repo / "notebooks" / "solutions"  # there a chapter finds the solved earlier ones
    stems = pick_chapters((p.stem for p in chapter_files(folder)), chapters)
    (build / "course").mkdir(parents=True, exist_ok=True)
    at_once, threads = sharing(len(stems))

    async def run_chapter(run: ChapterRun) -> tuple:
        notebook = nbformat.read(folder / f"{run.stem}.ipynb", as_version=4)
        start, error = time.perf_counter(), None
        try:
            await execute_async(notebook, folder, strict=True, threads=threads)
        except CellFailed as failure:
            error = str(failure)
        return replace(run, seconds=time.perf_counter() - start, error=error), notebook

    waiting, under_way, pictured = deque(stems), set(), ""
    with event_loop() as loop:
        while waiting or under_way:
            while waiting and len(under_way) < at_once:
                stem = waiting.popleft()
                path = build / "course" / f"{stem}.ipynb"
                run = ChapterRun(stem, path, BUDGETS.get(stem.split("_")[0]))
                yield run
                under_way.add(loop.create_task(run_chapter(run)))
            done, under_way = loop.run_until_complete(
                asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
            )
            for run, notebook in (task.result() for task in done):
                nbformat.write(notebook, run.path)
                picture = sample_grid(notebook)
                if picture is not None and run.stem > pictured:  # chapters end in any order
                    (build / "samples.png").write_bytes(picture)
                    pictured = run.stem
                yield run
                if run.error:
                    raise CourseFailed(f"{run.stem}: {run.error}; see {run.path}")


def sample_grid(notebook) -> bytes | None:
    """Return the last PNG among the outputs of cells tagged `sample-grid`, None if none."""
    picture = None
    for cell in notebook.cells:
        if SAMPLE_TAG in cell.metadata.get("tags", []):
            for output in cell.get("outputs", []):
                picture = output.get("data", {}).get("image/png", picture)
    return None if picture is None else base64.b64decode(picture)


def copy_to_my(repo: Path) -> list[Path]:
    """Copy the chapters that `my/` does not have yet, and return the copies made.

    Never writes over a file, and leaves no half of one if it is interrupted.
    """
    my = repo / "my"
    my.mkdir(exist_ok=True)
    return [my / p.name for p in chapter_files(repo / "notebooks") if copy_new(p, my / p.name)]


def reset_chapter(repo: Path, chapter: str) -> tuple[Path | None, Path]:
    """Put a fresh copy of one chapter into `my/`; return where the old one went, and the copy.

    The old one becomes `my/NN_stem.before-reset-N.ipynb`, with the first N that is free; None
    if there was none. Raises ValueError for a chapter that is not there, or for more than one.
    """
    stems = pick_chapters((p.stem for p in chapter_files(repo / "notebooks")), [chapter])
    if len(stems) > 1:
        raise ValueError(f"{chapter!r} is more than one chapter: {', '.join(stems)}; name one")
    fresh = repo / "my" / f"{stems[0]}.ipynb"
    fresh.parent.mkdir(exist_ok=True)
    old = set_aside(fresh) if os.path.lexists(fresh) else None
    if not copy_new(repo / "notebooks" / fresh.name, fresh):
        raise FileExistsError(f"{fresh} came back while it was reset; close it and reset again")
    return old, fresh


def copy_new(source: Path, target: Path) -> bool:
    """Copy to a name that is free; False, and nothing written, if it is taken."""
    content = source.read_bytes()
    try:
        file = open(target, "xb")
    except FileExistsError:
        return False
    try:
        with file:
            file.write(content)
    except BaseException:  # an interruption too must not leave half a file
        target.unlink()
        raise
    return True


def set_aside(path: Path) -> Path:
    """Rename a notebook to the first free `NN_stem.before-reset-N.ipynb`."""
    number = 1
    while True:
        backup = path.with_name(f"{path.stem}.before-reset-{number}.ipynb")
        try:
            backup.touch(exist_ok=False)  # claims the name: the rename can replace nothing else
            break
        except FileExistsError:
            number += 1
    try:
        os.replace(path, backup)
    except OSError:
        backup.unlink()  # not moved: it is still empty
        raise
    return backup


def run_jupyter(command: Sequence[str], folder: Path) -> int:
    """Run a Jupyter program in a folder until it ends; return its exit status.

    It finds the course's page template and settings (no pop-up that asks for news). Ctrl-C reaches
    it directly, and it decides; SIGTERM ends both.
    """
    environment = dict(os.environ)
    for variable in ("JUPYTER_PATH", "JUPYTER_CONFIG_PATH"):
        paths = [str(JUPYTER), environment.get(variable)]
        environment[variable] = os.pathsep.join(filter(None, paths))
    process = subprocess.Popen([sys.executable, "-m", *command], cwd=folder, env=environment)
    before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue  # the same Ctrl-C reached the program
    finally:
        signal.signal(signal.SIGTERM, before)


def chapter_files(folder: Path) -> list[Path]:
    """Its chapters, in order. Raises FileNotFoundError if there is none."""
    paths = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not paths:
        raise FileNotFoundError(f"no chapters in {folder}; build them: tools/build_notebooks.py")
    return paths


def repository() -> Path:
    """The clone that the package stands in. Raises ValueError if it was installed without it."""
    repo = Path(__file__).resolve().parents[2]
    if not (repo / "notebooks" / "src").is_dir():
        raise ValueError(
            f"there are no notebooks beside the package in {repo}; this command needs a clone of "
            "the repository: run it there (pip install -e .)"
        )
    return repo


# The commands ------------------------------------------------------------------------------------


def course(chapters: tuple[str, ...] = ()) -> int:
    """Run every chapter, solved, on the bundled data; write notebooks and pictures to build/."""
    build, start = repository() / "build", time.perf_counter()
    try:
        for run in run_course(repository(), build, chapters):
            if not run.finished:
                print(f"{run.stem:<16} running ...", flush=True)
                continue
            budget = f" (budget {run.budget} s)" if run.budget else ""
            late = "  over budget" if run.over_budget else ""
            print(f"{run.stem:<16} {run.seconds:.0f} s{budget}{late}", flush=True)
    except CourseFailed as error:
        print(f"\nThe course stopped: {error}", file=sys.stderr)
        return 1
    print(f"\nThe course took {time.perf_counter() - start:.0f} s. Look at:")
    print(f"  {build / 'samples.png'}   images that it made just now")
    print(f"  {build / 'course'}   the chapters, solved and executed")
    print("Then start learning: make lab (or python -m mar_mini lab)")
    return 0


def lab(arguments: tuple[str, ...] = ()) -> int:
    """Open the course in JupyterLab on copies in my/, which nothing ever writes over.

    Args:
        arguments: further ones of JupyterLab, behind a `--`.
    """
    repo = repository()
    copy_to_my(repo)
    return run_jupyter(["jupyterlab", "--notebook-dir", str(repo / "my"), *arguments], repo)


def lab_reset(chapter: str) -> int:
    """Put a fresh copy of a chapter (06 or 06_masking) into my/; the old one is renamed first."""
    old, fresh = reset_chapter(repository(), chapter)
    print(f"{fresh} is new; yours is now {old}" if old else f"{fresh} is new")
    return 0


def test(*, fast: bool = False) -> int:
    """Run style checks, then as many tests at once as there are cores; --fast: the quick ones."""
    python = [sys.executable, "-m"]
    # tests/conftest.py says what is one piece of work, and which goes first
    pool = ["-n", str(cores()), "--dist", "loadscope", "--no-loadscope-reorder"]
    quick = ["-m", "not slow"] if fast else []
    steps = [
        [*python, "ruff", "check", "."],
        [*python, "ruff", "format", "--check", "-q", "."],
        [*python, "codespell_lib", "."],
        [*python, "pytest", "-q", "--durations=8", *pool, *quick],
    ]
    for command in steps:
        print("+", " ".join(command[1:]), flush=True)
        # a second thread of one test would only wait for the other tests
        status = subprocess.call(
            command, cwd=repository(), env={"OMP_NUM_THREADS": "1"} | os.environ
        )
        if status:
            return status
    return 0
